"""Rounds of progressive distillation: states to learn at, the grid, and the loss of a round.

Source: Salimans & Ho 2022, arXiv:2202.00512, Alg. 2. A round's student takes N steps on every other
time of its teacher's grid of 2N.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t, u, s: (B,).

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Prediction
from stepdistill.core.method import Setting
from stepdistill.core.path import NoisePath
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Batch
from stepdistill.losses.progressive import progressive_target, progressive_weight
from stepdistill.losses.regression import squared_error, weighted_mean
from stepdistill.methods.lora_guidance_config import LoRAGuidanceConfig

Answers = Callable[[Tensor, Tensor], Prediction]  # (x_t, t) -> a network's prediction there


def trailing_grid(setting: Setting, num_steps: int) -> tuple[float, ...]:
    """Descending times 1, ..., 1/N under the shift, on the teacher's table.

    Below sigma_min of a VE path a time stands there more than once: steps that change nothing.
    """
    times = torch.tensor(uniform_grid(num_steps, setting.shift), dtype=torch.float64)
    return tuple(setting.path.snap(times).tolist())


@torch.no_grad()
def roll_out(
    path: NoisePath, teach: Answers, times: Sequence[float], batch: Batch, ctx: Ctx
) -> Tensor:
    """x (B, C, *S) at the last of `times`, by the teacher's steps from noise at the first."""
    x = path.prior(ctx.randn((batch.bsz, *batch.shape)))
    for now, later in pairwise(times):
        x = teach(x, ctx.times(now, batch.bsz)).step(ctx.times(later, batch.bsz))
    return x


def halving_loss(
    config: LoRAGuidanceConfig,
    setting: Setting,
    steps: int,
    teach: Answers,
    student: Answers,
    batch: Batch,
    ctx: Ctx,
) -> Tensor:
    """Weighted | x0_student(x_u, u) - x_target |^2 of a student of N = `steps` steps."""
    path, bsz = setting.path, batch.bsz
    grid = (*trailing_grid(setting, 2 * steps), 0.0)
    points = torch.tensor(grid, dtype=torch.float64, device=ctx.device)
    if config.states == "data":
        assert batch.x0 is not None, "the trainer checks `needs`"
        index = 2 * ctx.randint(0, steps, bsz)
        x_u = path.noised(batch.x0, ctx.randn(tuple(batch.x0.shape)), points[index])
    else:
        shared = 2 * ctx.shared_randint(0, steps)
        index = torch.full((bsz,), shared, device=ctx.device)
        x_u = roll_out(path, teach, grid[: shared + 1], batch, ctx)
    u, middle, s = (points[index + i] for i in range(3))
    with torch.no_grad():
        x_s = teach(teach(x_u, u).step(middle), middle).step(s)
        target = progressive_target(path, x_u, x_s, u, s)
    weight = progressive_weight(config.halving_weight, path, u)
    return weighted_mean(squared_error(student(x_u, u).x0, target), weight)
