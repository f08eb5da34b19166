"""The warm start of a student: regression on the teacher's own trajectories, from prompts alone.

The teacher solves its ODE from pure noise to x_0; the student at step k of its grid learns that x_0
from the trajectory's state there, | student(x_k, t_k) - x_0 |. Step 0 gets the noise itself,
whatever time it is told (DMD2 tells one-step SDXL index 399). `WarmStarted` is the base of methods
that may begin so: the student starts at the teacher (or init_student_from), and in the first
warm_start.updates updates its loss is `warm_loss`.
Sources: Yin et al. 2024, arXiv:2405.14867, Sec. 5 (one step, on pairs made beforehand); for several
steps the states of stored paths in NVlabs/FastGen's KD.
Differs from both: trajectories are solved in every update, so that no pairs are made beforehand.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Generic, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Method, MethodConfig, Nets, Setting
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.regression import DistanceName, distance, per_sample
from stepdistill.methods.rollout import Rollout, RolloutConfig


class WarmStartConfig(MethodConfig):
    """Off unless updates > 0."""

    updates: int = Field(default=0, ge=0)
    """Student updates that regress on the teacher's trajectories before the method's own."""
    rate: float = Field(default=1.0, gt=0)
    """The student's learning rate meanwhile, in units of its own: regression bears more of it."""
    teacher_steps: int = Field(default=16, ge=1)
    """Teacher steps of a whole trajectory, on the uniform grid under its shift."""
    loss: DistanceName = "l2"
    """Distance of the student's x0 to the trajectory's end, of latents."""
    huber_c: float = Field(default=1e-3, gt=0)
    """c of the pseudo-Huber distance."""


class WarmStartedConfig(RolloutConfig):
    """Options of a method that may begin with a warm start."""

    warm_start: WarmStartConfig = WarmStartConfig()
    """Regression on the teacher's own trajectories in the first updates; off by default."""


W = TypeVar("W", bound=WarmStartedConfig)


class WarmStarted(Method[W], Generic[W]):
    """Base of a few-step student by the rollout that may begin with a warm start."""

    rollout: Rollout

    def __init__(self, config: W, setting: Setting) -> None:
        super().__init__(config, setting)
        if setting.owned != (0.0, 1.0) and config.warm_start.updates:
            raise ValueError(
                "warm_start: expected none of one expert (the teacher's trajectories cross both), "
                f"got updates {config.warm_start.updates}. Leave it out."
            )

    @property
    def part_starts(self) -> tuple[int, ...]:
        return tuple(sorted({0, self.config.warm_start.updates}))

    def learning_rate_scale(self, step: int, max_steps: int, role: str) -> float:
        return self.config.warm_start.rate if role == "student" and self.warming(step) else 1.0

    def warming(self, step: int) -> bool:
        """Whether the student's update at that step is the warm start's."""
        return step < self.config.warm_start.updates

    def warm_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The student's loss meanwhile, against the guided teacher."""
        config, times = self.config.warm_start, self.rollout.times
        g, teacher = self.teacher_guidance, nets["teacher"].skipping(self.skip_layers)
        loss = warm_start_loss(nets, teacher, batch, ctx, self.setting, config, times, g)
        return Losses(loss, {"warm_start": loss.detach()})


def warm_start_loss(
    nets: Nets,
    teacher: Denoiser,
    batch: Batch,
    ctx: Ctx,
    setting: Setting,
    config: WarmStartConfig,
    times: Sequence[float],
    guidance: float,
) -> Tensor:
    """Mean distance of the student's x0 at a shared random step of its grid to the teacher's end.

    Args: times: the student's grid, descending. guidance: the teacher's, null + g (cond - null).
    """
    k, bsz, path = ctx.shared_randint(0, len(times)), batch.bsz, setting.path
    even = torch.tensor(uniform_grid(config.teacher_steps, setting.shift), dtype=torch.float64)
    states = path.snap(even).tolist()
    grid = sorted({*states, *(times[k : k + 1] if k else ())}, reverse=True)
    x = start = path.prior(ctx.randn((bsz, *batch.shape)))
    with torch.no_grad():
        for t, s in pairwise((*grid, 0.0)):
            if k and t == times[k]:
                start = x
            at, end = ctx.times(t, bsz), ctx.times(s, bsz)
            pred = teacher(x, at, batch.cond, batch.null, guidance)
            x = pred.x0 if s == 0.0 else pred.step(end)
    x0 = nets["student"](start, ctx.times(times[k], bsz), batch.cond).x0
    return per_sample(distance(config.loss, x0, x, config.huber_c)).mean()
