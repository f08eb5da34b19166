"""Phased consistency model (PCM), deterministic: every point jumps to its phase's clean edge.

M phases of a solver grid; the student maps each grid time to the edge its phase ends at, so that M
deterministic steps over the edges make a sample. M = 1 is consistency distillation.
Source: Wang et al. 2024, arXiv:2405.18407, and its released code.
Differs from the code: the last edge is clean data (the code's: table index 0, on flow the smallest
grid sigma); the critic's noise travel on flow has the forward kernel's variance; a critic update
comes with every student update (the code alternates them and counts both).
"""

# Shapes: B batch.

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.methods.digits import jumps
from stepdistill.methods.segments import check_segments
from stepdistill.methods.trajectory import TrajectoryMethod
from stepdistill.methods.trajectory_config import TrajectoryConfig


class PCMConfig(TrajectoryConfig):
    """Options of pcm."""

    num_phases: int = Field(default=4, ge=1)
    """Phases M, and so the student's steps."""

    @model_validator(mode="after")
    def _check(self) -> PCMConfig:
        check_segments(self.num_grid, (self.num_phases,))
        return self


class PCM(TrajectoryMethod[PCMConfig]):
    """Consistency within each of M phases, sampled in M deterministic steps.

    The target of a phase's first interval is the teacher's x_s itself, for s is the edge.
    """

    name = "pcm"
    paper = "Wang et al. 2024, arXiv:2405.18407"
    Config = PCMConfig
    status = "trained on real data here"
    aliases = {"phased_consistency": {}}
    trainer = "TrajectorySegmentedTrainer"
    data = "images"
    steps = (2, 4)
    steps_option = "num_phases"
    digits = (Recipe("pcm", jumps(1200, loss="l2")),)

    def num_segments(self, step: int, max_steps: int) -> int:
        return self.config.num_phases

    def draw_end(self, ctx: Ctx, index: Tensor, k: int) -> Tensor:
        return self.segments.lower(index, k)

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """The phases' noisy edges. Errors: ValueError for any other number of steps."""
        edges = self.segments.edges(self.config.num_phases)
        if num_steps not in (None, len(edges)):
            raise ValueError(
                f"num_steps: expected {len(edges)}, the number of phases (inference steps must be "
                f"phase edges), got {num_steps}. Train with num_phases: {num_steps}."
            )
        return SamplerSpec(edges, "ode", trained_times=edges)
