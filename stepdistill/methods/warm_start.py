"""The warm start of a student: regression on the teacher's own trajectories, from prompts alone.

The teacher solves its ODE from pure noise to x_0; the student at step k of its grid learns that x_0
from the trajectory's state there, | student(x_k, t_k) - x_0 |. Step 0 gets the noise itself,
whatever time it is told (DMD2 tells one-step SDXL index 399).
Sources: Yin et al. 2024, arXiv:2405.14867, Sec. 5 (one step, on pairs made beforehand); for several
steps the states of stored paths in NVlabs/FastGen's KD.
Differs from both: trajectories are solved in every update, so that no pairs are made beforehand.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import MethodConfig, Nets, Setting
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Batch
from stepdistill.losses.regression import DistanceName, distance, per_sample


class WarmStartConfig(MethodConfig):
    """Off unless updates > 0."""

    updates: int = Field(default=0, ge=0)
    """Student updates that regress on the teacher's trajectories before distribution matching."""
    rate: float = Field(default=1.0, gt=0)
    """The student's learning rate meanwhile, in units of its own: regression bears more of it."""
    teacher_steps: int = Field(default=16, ge=1)
    """Teacher steps of a whole trajectory, on the uniform grid under its shift."""
    loss: DistanceName = "l2"
    """Distance of the student's x0 to the trajectory's end, of latents."""
    huber_c: float = Field(default=1e-3, gt=0)
    """c of the pseudo-Huber distance."""


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
