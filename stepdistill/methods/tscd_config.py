"""Options of tscd."""

from __future__ import annotations

import warnings
from itertools import pairwise

from pydantic import model_validator

from stepdistill.methods.segments import check_segments
from stepdistill.methods.stages import check_stage_starts, stage_at, stage_begins
from stepdistill.methods.trajectory_config import AnyEndConfig


class TSCDConfig(AnyEndConfig):
    """Options of tscd."""

    segments: tuple[int, ...] = (8, 4, 2, 1)
    """Segment counts k of the stages, falling; each divides the one before and num_grid."""
    stage_starts: tuple[float, ...] | None = None
    """Where the stages after the first begin: fractions of max_train_steps below 1, or student
    steps from 1 on; none means stages of equal length."""
    loss_scale: tuple[float, ...] | None = None
    """Factor on the distance at each stage; none means 1 throughout. With a GAN it may fall."""
    gan_scale: tuple[float, ...] | None = None
    """Factor on gan.weight_g at each stage; none means 1 throughout. The head trains at every
    stage, so that it is ready where its weight rises."""

    @model_validator(mode="after")
    def _check(self) -> TSCDConfig:
        falls = all(a > b > 0 and a % b == 0 for a, b in pairwise(self.segments))
        if not self.segments or self.segments[0] < 1 or not falls:
            raise ValueError(
                f"segments: expected falling counts, each a divisor of the one before, got "
                f"{self.segments}. Edges of a stage must be edges of the stage before."
            )
        check_segments(self.num_grid, self.segments)
        check_stage_starts(self.stage_starts, len(self.segments))
        for name in ("loss_scale", "gan_scale"):
            scale = getattr(self, name)
            if scale is not None and (len(scale) != len(self.segments) or min(scale) < 0):
                raise ValueError(
                    f"{name}: expected {len(self.segments)} factors >= 0, one for each of "
                    f"segments {self.segments}, got {scale}."
                )
        if self.gan_scale is not None and not self.gan.enabled:
            warnings.warn("gan_scale has no effect: gan.weight_g is 0.", stacklevel=2)
        for stage in range(len(self.segments)):
            if self.weights(stage) == (0.0, 0.0):
                raise ValueError(
                    f"loss_scale: expected a factor above 0 or an adversarial term, got neither: "
                    f"stage {stage + 1} would train on nothing."
                )
        if self.num_steps is not None and self.num_steps % self.segments[-1]:
            raise ValueError(
                f"num_steps: expected a multiple of the last segment count {self.segments[-1]}, "
                f"got {self.num_steps}."
            )
        return self

    def weights(self, stage: int) -> tuple[float, float]:
        """Weights of the distance and of the adversarial term at that stage."""
        factors = [1.0 if s is None else s[stage] for s in (self.loss_scale, self.gan_scale)]
        return factors[0], self.gan.weight_g * factors[1]

    def stage_of(self, step: int, max_steps: int) -> int:
        """The stage that student step `step` belongs to: from the position alone, never from state.

        Errors: ValueError for explicit starts at or beyond max_steps, whose stages never come.
        """
        return stage_at(step, stage_begins(len(self.segments), self.stage_starts, max_steps))
