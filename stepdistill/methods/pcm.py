"""Phased consistency model (PCM): every point jumps to its phase's clean edge.

M phases of a solver grid; the student maps each grid time to the edge its phase ends at, so that M
deterministic steps over the edges make a sample. M = 1 is consistency distillation, and may be
sampled with fresh noise.
Source: Wang et al. 2024, arXiv:2405.18407, and its released code.
Differs from the code: the last edge is clean data (the code's: table index 0, on flow the smallest
grid sigma); the critic's noise travel on flow has the forward kernel's variance; a critic update
comes with every student update (the code alternates them and counts both).
"""

# Shapes: B batch.

from __future__ import annotations

from typing import Literal

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
    """Phases M, and so the student's steps by the ode sampler."""
    sampler: Literal["ode", "renoise"] = "ode"
    """Deterministic steps over the edges, or of one phase x0 and fresh noise (the code's stochastic
    SD3 model) in any number of steps."""
    num_steps: int | None = Field(default=None, ge=1)
    """Sampling steps of renoise where none are asked for; none means 4."""

    @model_validator(mode="after")
    def _check(self) -> PCMConfig:
        check_segments(self.num_grid, (self.num_phases,))
        if self.sampler == "renoise":
            if self.num_phases != 1:
                raise ValueError(
                    f"sampler: expected num_phases 1 with renoise, got {self.num_phases}: students "
                    "of more phases jump to edges, not to clean data. Set one of the two."
                )
            if self.num_steps is not None and self.num_steps > self.num_grid:
                raise ValueError(
                    f"num_steps: expected at most num_grid = {self.num_grid}, got {self.num_steps}."
                )
        elif self.num_steps not in (None, self.num_phases):
            raise ValueError(
                f"num_steps: expected {self.num_phases}, the number of phases, got "
                f"{self.num_steps}. Leave it out, or set sampler: renoise."
            )
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
        """The phases' noisy edges, or with renoise grid times of any number of steps.

        Errors: ValueError for a number of steps that was not trained.
        """
        guidance = self.config.inference_guidance
        if self.config.sampler == "renoise":
            times = self.grid.visit(
                num_steps or self.config.num_steps or min(4, len(self.grid.starts))
            )
            trained = tuple(self.grid.starts.flip(0).tolist())
            return SamplerSpec(times, "renoise", trained_times=trained, guidance=guidance)
        edges = self.segments.edges(self.config.num_phases)
        if num_steps not in (None, len(edges)):
            raise ValueError(
                f"num_steps: expected {len(edges)}, the number of phases (inference steps must be "
                f"phase edges), got {num_steps}. Train with num_phases: {num_steps}."
            )
        return SamplerSpec(edges, "ode", trained_times=edges, guidance=guidance)
