"""How far the fake score lags behind the student, as a share of the student's gradient.

Distribution matching takes `fake - real` for the direction `posterior - real`, where `posterior` is
the mean of the student's own x0 given x_t. A fake fitted to the student's present samples leaves
residuals x0 - fake that are orthogonal to every function of x_t, so to `fake - real` too:

    lag = E <x0 - fake, fake - real> / E |fake - real|^2  =  <posterior - fake, d> / |d|^2,

with d = fake - real the direction in use. The true direction has 1 + lag times its length along d:
0 is a fake that keeps up; above 0 the student is farther from the teacher than the fake knows;
below -1 the student is pushed the wrong way. Where the method guides the fake, d has its guided
prediction, but the residual is that of the prediction which is fitted: right where the fake lags
alike with and without the condition. The orthogonality is what Score identity Distillation builds
its loss on (Zhou et al. 2024, arXiv:2404.04057); to read it as a lag is ours. It holds whatever
guidance `real` has, and for a fake that is itself never trained.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import FakeFit
from stepdistill.core.types import Cond

LAG_TIMES = (0.25, 0.5, 0.75)  # before the resolution shift


@torch.no_grad()
def lag_terms(
    teacher: Denoiser,
    fake: Denoiser,
    x0: Tensor,
    cond: Cond,
    null: Cond | None,
    fit: FakeFit,
    times: Sequence[float],
    noise: Callable[[int], Tensor],
) -> Tensor:
    """(B, 2): each sample's <x0 - fake, fake - real> and |fake - real|^2, means over all values.

    Args: x0: (B, C, *S) of the student as the fake is trained on. noise: index of a time ->
        (B, C, *S). fit: guidance of teacher and fake in the student's gradient.
    """
    sums = torch.zeros(x0.shape[0], 2, device=x0.device)
    for index, t in enumerate(times):
        at = torch.full((x0.shape[0],), t, dtype=torch.float64, device=x0.device)
        x_t = fake.path.add_noise(x0, noise(index), at)
        real = teacher(x_t, at, cond, null, fit.teacher).x0.float()
        fitted = fake(x_t, at, cond, null, fit.fitted).x0.float()
        guided = (
            fitted if fit.fake == fit.fitted else fake(x_t, at, cond, null, fit.fake).x0.float()
        )
        direction = (guided - real).flatten(1)
        residual = (x0.float() - fitted).flatten(1)
        sums[:, 0] += (residual * direction).mean(1)
        sums[:, 1] += direction.square().mean(1)
    return sums / len(times)


def lag_of(terms: Tensor) -> tuple[float, float]:
    """(lag, its standard error over samples) of terms (N, 2); (0, 0) where nothing is pushed."""
    top, bottom = terms.double().cpu().unbind(1)
    scale = float(bottom.mean())
    if scale <= 0.0:
        return 0.0, 0.0
    lag = float(top.mean()) / scale
    spread = (top - lag * bottom).std(unbiased=False) if len(terms) > 1 else top.abs().max()
    return lag, float(spread) / (scale * max(1, len(terms) - 1) ** 0.5)
