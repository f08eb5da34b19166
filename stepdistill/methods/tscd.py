"""Trajectory-segmented consistency distillation (TSCD, of Hyper-SD).

The time axis is cut into k segments; the student learns to jump from any grid time to any cleaner
grid time of the same segment, against the guided teacher's own trajectory. k falls by stages, 8, 4,
2, 1, each starting from the student of the one before. k = 1 is trajectory consistency (TCD): one
student for any number of steps.
Source: Ren et al. 2024, arXiv:2404.13686, Sec. 3.1; TCD: Zheng et al. 2024, arXiv:2402.19159.
Differs from the paper: edges stand in index space (see segments.py); the original teacher stays the
solver at every stage, which the paper leaves open; the adversarial term compares noised jumps.
"""

# Shapes: B batch.

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.methods.digits import jumps
from stepdistill.methods.segments import check_segments
from stepdistill.methods.stages import check_stage_starts, stage_at, stage_begins
from stepdistill.methods.trajectory import TrajectoryMethod
from stepdistill.methods.trajectory_config import TrajectoryConfig


class TSCDConfig(TrajectoryConfig):
    """Options of tscd."""

    segments: tuple[int, ...] = (8, 4, 2, 1)
    """Segment counts k of the stages, falling; each divides the one before and num_grid."""
    stage_starts: tuple[float, ...] | None = None
    """Where the stages after the first begin: fractions of max_train_steps below 1, or student
    steps from 1 on; none means stages of equal length."""
    gan_scale: tuple[float, ...] | None = None
    """Factor on gan.weight_g at each stage; none means 1 throughout. The head trains at every
    stage, so that it is ready where its weight rises."""
    sampler: Literal["ode", "tcd"] = "ode"
    """Deterministic steps (trailing DDIM, on flow Euler), or TCD's with noise travel (VP)."""
    gamma: float = Field(default=0.3, ge=0, le=1)
    """Stochasticity of the tcd sampler: 0 none, 1 fresh noise on x0. Read with tcd alone."""
    num_steps: int | None = Field(default=None, ge=1)
    """Sampling steps where none are asked for, a multiple of the last segment count (the
    default)."""

    @model_validator(mode="after")
    def _check(self) -> TSCDConfig:
        falls = all(a > b and a % b == 0 for a, b in pairwise(self.segments))
        if not self.segments or min(self.segments) < 1 or not falls:
            raise ValueError(
                f"segments: expected falling counts, each a divisor of the one before, got "
                f"{self.segments}. Edges of a stage must be edges of the stage before."
            )
        check_segments(self.num_grid, self.segments)
        check_stage_starts(self.stage_starts, len(self.segments))
        if self.gan_scale is not None:
            if len(self.gan_scale) != len(self.segments) or min(self.gan_scale) < 0:
                raise ValueError(
                    f"gan_scale: expected {len(self.segments)} factors >= 0, one for each of "
                    f"segments {self.segments}, got {self.gan_scale}."
                )
            if not self.gan.enabled:
                warnings.warn("gan_scale has no effect: gan.weight_g is 0.", stacklevel=2)
        if self.num_steps is not None and self.num_steps % self.segments[-1]:
            raise ValueError(
                f"num_steps: expected a multiple of the last segment count {self.segments[-1]}, "
                f"got {self.num_steps}."
            )
        return self

    def stage_of(self, step: int, max_steps: int) -> int:
        """The stage that student step `step` belongs to: from the position alone, never from state.

        Errors: ValueError for explicit starts at or beyond max_steps, whose stages never come.
        """
        return stage_at(step, stage_begins(len(self.segments), self.stage_starts, max_steps))


# Most of the digits' run belongs to the last stage, whose one segment any number of steps crosses.
STAGES = {"loss": "l2", "segments": [8, 4, 2, 1], "stage_starts": [0.05, 0.12, 0.25]}


class TSCD(TrajectoryMethod[TSCDConfig]):
    """Jumps to any end within a segment; segments merge stage by stage."""

    name = "tscd"
    paper = "Ren et al. 2024, arXiv:2404.13686"
    Config = TSCDConfig
    status = "trained on real data here"
    aliases = {"hyper_sd": {}, "tcd": {"segments": (1,), "sampler": "tcd"}}
    trainer = "TrajectorySegmentedTrainer"
    data = "images"
    one_student = True
    digits = (
        Recipe("tscd", jumps(1500, **STAGES)),
        Recipe(
            "tscd_one_lora",
            jumps(1500, **STAGES, sampler="tcd", gamma=0.3),
            steps=(1, 2, 4, 8),
            layouts=("lora",),
        ),
    )

    def num_segments(self, step: int, max_steps: int) -> int:
        return self.config.segments[self.config.stage_of(step, max_steps)]

    def draw_end(self, ctx: Ctx, index: Tensor, k: int) -> Tensor:
        return self.segments.draw_end(ctx.rand(len(index)), index, k)

    def gan_weight(self, ctx: Ctx) -> float:
        scale, config = self.config.gan_scale, self.config
        stage = config.stage_of(ctx.step, ctx.max_steps)
        return config.gan.weight_g * (1.0 if scale is None else scale[stage])

    def resets(self, step: int, max_steps: int) -> tuple[str, ...]:
        """All trained roles where a new stage begins."""
        stage_of = self.config.stage_of
        if step == 0 or stage_of(step, max_steps) == stage_of(step - 1, max_steps):
            return ()
        return ("student", *self.config.gan.roles())

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """Grid times that stop at every edge of the last stage's segments.

        Errors: ValueError for a num_steps that would cross one.
        """
        return self._sampler(self.config.segments[-1], num_steps)

    def sampler_at(self, step: int, max_steps: int, num_steps: int | None = None) -> SamplerSpec:
        """See Method.sampler_at: the edges of the stage reached, and k steps where its own number
        would cross one."""
        last = step - 1 if step else max_steps
        return self._sampler(self.num_segments(last, max_steps), num_steps)

    def _sampler(self, k: int, num_steps: int | None) -> SamplerSpec:
        config = self.config
        own = config.num_steps or k
        own = own if own % k == 0 else k
        return SamplerSpec(
            self.segments.visit(own if num_steps is None else num_steps, k),
            config.sampler,
            trained_times=tuple(self.grid.starts.flip(0).tolist()),
            gamma=config.gamma if config.sampler == "tcd" else 0.0,
        )
