"""Which times are visited: grids for solvers and samplers, and laws to draw training times from.

Every law maps u ~ U(0, 1) of shape (B,) to times, so randomness stays with the caller. Resolution
shift moves times; it is never part of a path.
"""

# Shapes: B batch. All results float64.

from __future__ import annotations

import math

import torch
from torch import Tensor

from stepdistill.core.path import NoisePath

# Times closer than this are one. A shifted grid may come upon a boundary between two experts, in
# floating point on either side of it: 3/7 at shift 12 is .9.
SAME_TIME = 1e-6


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t' = k t / (1 + (k - 1) t): noise-to-signal ratio times k (SD3's resolution shift).

    Source: Esser et al. 2024, arXiv:2403.03206, Eq. 23.
    """
    t = t.double()
    return shift * t / (1.0 + (shift - 1.0) * t)


def unshift_times(t: Tensor, shift: float) -> Tensor:
    """The inverse of `shift_times`."""
    return shift_times(t, 1.0 / shift)


def uniform_grid(num_steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """Descending times 1, (N-1)/N, ..., 1/N, shifted: "trailing" spacing on a VP table."""
    if num_steps < 1:
        raise ValueError(f"uniform_grid: expected num_steps >= 1, got {num_steps}.")
    grid = torch.arange(num_steps, 0, -1, dtype=torch.float64) / num_steps
    return tuple(shift_times(grid, shift).tolist())


def snapped_grid(path: NoisePath, num_steps: int, shift: float = 1.0) -> tuple[float, ...]:
    """`uniform_grid`, each time moved to the nearest one that the teacher knows.

    Errors: ValueError where two of them fall on one, as all below sigma_min do on a VE path.
    """
    times = _snapped(path, num_steps, shift)
    if len(set(times)) < num_steps:
        most = most_steps(path, num_steps, shift)
        raise ValueError(
            f"num_steps: expected at most {most}, got {num_steps}: of those times "
            f"{num_steps - len(set(times))} fall on others, as the nearest that the teacher was "
            f"trained at. Set {most} or fewer."
        )
    return times


def most_steps(path: NoisePath, num_steps: int, shift: float = 1.0) -> int:
    """The most steps, up to num_steps, of which `snapped_grid` has no two on one time."""
    counts = range(num_steps, 0, -1)
    return next(n for n in counts if len(set(_snapped(path, n, shift))) == n)


def _snapped(path: NoisePath, count: int, shift: float) -> tuple[float, ...]:
    times = torch.tensor(uniform_grid(count, shift), dtype=torch.float64)
    return tuple(path.snap(times).tolist())


def uniform_times(u: Tensor, low: float | Tensor = 0.0, high: float | Tensor = 1.0) -> Tensor:
    """Uniform on [low, high], numbers or (B,)."""
    return low + (high - low) * u.double()


def beta_times(u: Tensor, a: float, b: float) -> Tensor:
    """Density proportional to t^(a-1) (1-t)^(b-1), for a, b >= 1: more noise the larger a / b.

    By the inverse of its distribution function, summed over 4,096 equal cells.
    """
    cells = 4096
    middle = (torch.arange(cells, dtype=torch.float64, device=u.device) + 0.5) / cells
    below = torch.cumsum(middle ** (a - 1.0) * (1.0 - middle) ** (b - 1.0), 0)
    below = below / below[-1]
    cell = torch.searchsorted(below, u.double())
    before = torch.where(cell > 0, below[(cell - 1).clamp_min(0)], 0.0)
    return (cell + (u.double() - before) / (below[cell] - before)) / cells


def logit_normal_times(u: Tensor, mean: float, std: float) -> Tensor:
    """t / (1 - t) is log-normal: sigmoid(mean + std n). u at 0 or 1 gives that end itself.

    Source: Esser et al. 2024, arXiv:2403.03206, Sec. 3.1; as EDM's law of sigma = t / (1 - t).
    """
    normal: Tensor = torch.special.ndtri(u.double())
    return (mean + std * normal).sigmoid()


def u_shaped_times(u: Tensor, sharpness: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Density proportional to e^(a t) + e^(a (1 - t)), a = sharpness, mapped onto [low, high].

    Half of u draws y from a e^(a y) / (e^a - 1), the other half 1 - y.
    Source: Lee et al. 2024, arXiv:2405.20320, as released; their text has e^(a t) + e^(-a t), which
    is no U on [0, 1].
    """
    doubled = 2.0 * u.double()
    part = doubled - doubled.floor()
    y = torch.log1p(part * math.expm1(sharpness)) / sharpness
    return low + (high - low) * torch.where(doubled < 1.0, y, 1.0 - y)


def grid_times(u: Tensor, grid: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """A uniformly drawn grid entry per sample: (times, indices), each (B,)."""
    index = (u.double() * len(grid)).long().clamp_max(len(grid) - 1)
    return torch.tensor(grid, dtype=torch.float64, device=u.device)[index], index
