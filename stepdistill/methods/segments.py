"""Segments of a solver grid, in index space, and the jump to a point inside one.

The K + 1 points of a grid are numbered from the clean end: point 0 is the end, point i + 1 is start
i. k segments hold K / k intervals each, so their edges are grid points on every path, shifted flow
grids included. A point on an edge ends the segment above it and, as a start, belongs to the one
below: the teacher's step from it never crosses an edge, and no range of ends is empty.
Source: Wang et al. 2024 (PCM), arXiv:2405.18407, whose code has its edges in index space too;
Ren et al. 2024 (Hyper-SD), arXiv:2404.13686, Sec. 3.1, has them at multiples of 1000 / k, where the
step from time 149 to 124 would cross 125.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K grid intervals, k segments.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.core.denoiser import Prediction
from stepdistill.core.path import full, rows
from stepdistill.methods.grid import SolverGrid


def check_segments(num_grid: int, counts: Sequence[int]) -> None:
    """Errors: ValueError where some segment count does not divide num_grid."""
    if not counts or min(counts) < 1 or any(num_grid % k for k in counts):
        raise ValueError(
            f"num_grid: expected a multiple of all segment counts {tuple(counts)}, got {num_grid}. "
            "Edges would fall between grid points, and the teacher's step would cross them (the "
            "usual 50 points have this fault at 4 and 8 segments). Use 40 or 200, which also "
            "divide a 1000-step table."
        )


class Segments:
    """Index arithmetic of k equal segments on a solver grid.

    Args: grid: one whose end is clean data (boundary "none").
    """

    def __init__(self, grid: SolverGrid) -> None:
        self.path = grid.path
        self.points = torch.cat([grid.stops[:1], grid.starts])  # (K + 1,) float64 ascending

    @property
    def num_grid(self) -> int:
        return len(self.points) - 1

    def time(self, point: Tensor) -> Tensor:
        """(B,) float64 time of grid point `point` (B,)."""
        return self.points.to(point.device)[point]

    def lower(self, index: Tensor, k: int) -> Tensor:
        """(B,) the point at the clean edge of the segment that start `index` (B,) lies in."""
        size = self.num_grid // k
        return torch.div(index, size, rounding_mode="floor") * size

    def draw_end(self, u: Tensor, index: Tensor, k: int) -> Tensor:
        """(B,) points, uniform from the clean edge to the stop of interval `index`, both included.

        Args: u: (B,) uniform on [0, 1).
        """
        low = self.lower(index, k)
        return (low + (u * (index + 1 - low)).long()).minimum(index)

    def draw_noisier(self, u: Tensor, end: Tensor, index: Tensor, k: int) -> Tensor:
        """(B,) float64 times for noise travel: uniform from point `end` to its segment's top.

        Uniform in index space, between points too, on the table where the path has one.
        """
        top = self.lower(index, k) + self.num_grid // k
        position = end + u * (top - end)
        low = position.floor().long().clamp_max(self.num_grid - 1)
        below, above = self.time(low), self.time(low + 1)
        t = self.path.snap(below + (position - low) * (above - below))
        return t.maximum(self.time(end))  # snap moves time 0, which is on no table

    def edges(self, k: int) -> tuple[float, ...]:
        """Noisy edges of the k segments, descending: 1, (k - 1) / k, ..., 1 / k under the shift."""
        return tuple(self.points[self.num_grid // k :: self.num_grid // k].flip(0).tolist())

    def visit(self, num_steps: int, k: int) -> tuple[float, ...]:
        """Descending grid times of a num_steps sampler that stops at every edge of k segments.

        They are the times the stock TCDScheduler visits on K original steps; trailing spacing
        where num_steps divides K.
        Errors: ValueError where num_steps is no multiple of k, for a step would cross an edge.
        """
        if num_steps % k or not k <= num_steps <= self.num_grid:
            raise ValueError(
                f"num_steps: expected a multiple of {k} up to {self.num_grid} (inference steps "
                f"must stop at every segment edge), got {num_steps}."
            )
        points = [self.num_grid - (i * self.num_grid) // num_steps for i in range(num_steps)]
        return tuple(self.points[points].tolist())


@dataclass(frozen=True)
class Jumps:
    """estimate, target: (B, C, *S) at grid point `end` (B,), from interval `index` (B,)."""

    estimate: Tensor
    target: Tensor
    end: Tensor
    index: Tensor


def jump(pred: Prediction, s: Tensor) -> Tensor:
    """x_s (B, C, *S), the deterministic step to s (B,) <= t; bit-exactly x_t where s = t."""
    x_t = full(pred.x_t)
    return torch.where(rows(s >= pred.t, x_t), x_t, pred.step(s))
