"""Where methods stand on a path: consistency grids with their boundary, and rectified-flow time.

A solver grid has K start times. Start j is stepped to stop j, the next cleaner time; the cleanest
stop is the `end`, where a consistency function returns its input: f(x, end) = x, exactly.
    lcm   VP tables: skip/out of LCM; end is table index 0 (alpha_bar[0]), which lies at t = 1 / N
    cd    VE paths: skip/out of CD; end is sigma_min
    none  end is t = 0, where every x0 view of x_0 is x_0 itself (flow: x0 = x_t - t flow)
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K grid points.

from __future__ import annotations

import math
import warnings
from typing import Literal

import torch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser, Prediction
from stepdistill.core.method import Setting
from stepdistill.core.path import NoisePath, VEPath, VPPath, flow_time, full, rows
from stepdistill.core.solvers import boundary_x0
from stepdistill.core.times import logit_normal_times, shift_times
from stepdistill.core.types import Cond

Boundary = Literal["auto", "lcm", "cd", "none"]
LOWEST = 1e-3  # of rectified-flow times drawn from laws on all of (0, 1), as FastGen clamps them


def path_time(path: NoisePath, tau: Tensor) -> Tensor:
    """(B,) float64 path time of equal noise-to-signal ratio tau / (1 - tau), on the table.

    Inverse of `flow_time`, which grows with t on every path; beyond the path's range the nearest
    end (SD's table reaches 0.028 to 0.936).
    """
    if isinstance(path, VPPath):
        return path.snap(path.time_of_angle(torch.atan2(tau, 1.0 - tau)))
    if isinstance(path, VEPath):
        return path.snap(path.time_of_sigma(tau / (1.0 - tau)).clamp(0.0, 1.0))
    return tau.double()


def earlier_time(path: NoisePath, t: Tensor, r: Tensor, span: Tensor) -> Tensor:
    """(B,) the time `span` in tau before t, not before r, and of a table another entry than t's."""
    s = path_time(path, (flow_time(path, t) - span).clamp_min(LOWEST))
    if isinstance(path, VPPath):
        s = torch.minimum(s, (t - 1.0 / path.num_steps).clamp_min(1.0 / path.num_steps))
    return torch.maximum(s, r)


def drawn_times(path: NoisePath, u: Tensor, mean: float, std: float) -> Tensor:
    """(B,) float64 path times of u ~ U(0, 1) whose log(sigma / alpha) is normal, but not beyond
    rectified-flow times LOWEST and 1 - LOWEST."""
    return path_time(path, logit_normal_times(u, mean, std).clamp(LOWEST, 1.0 - LOWEST))


def warn_end_is_told(option: str, instead: str) -> None:
    """Warns that a student is told where its jump ends, by which option, and what exports."""
    warnings.warn(
        f"{option}: the student is told where its jump ends, which no stock pipeline does, so its "
        f"export will be refused. Set {instead} for one that exports.",
        stacklevel=3,
    )


class SolverGrid:
    """K start times (ascending, shifted), their stops, and the boundary blend.

    Args: num_grid: K. On a VP table t_j = (j + 1) / K is index (j + 1) N / K - 1, LCM's grid; on a
        flow path it is shifted by setting.shift; on a VE path it is uniform in t from sigma_min to
        sigma_max, the Karras grid of K + 1 points.
    Errors: ValueError where K does not divide a VP table or the boundary is another path's.
    """

    def __init__(
        self, setting: Setting, num_grid: int, boundary: Boundary = "auto", scale: float = 10.0
    ) -> None:
        self.path = path = setting.path
        path_boundary, low, ends = "none", 0.0, {"none": 0.0}
        if isinstance(path, VPPath):
            path_boundary, ends["lcm"] = "lcm", 1.0 / path.num_steps
            if path.num_steps % num_grid:
                raise ValueError(
                    f"num_grid: expected a divisor of the {path.num_steps}-step table, "
                    f"got {num_grid}. LCM uses 50 of 1000."
                )
        elif isinstance(path, VEPath):
            low = (path.sigma_min / path.sigma_max) ** (1.0 / path.rho)
            path_boundary, ends["cd"] = "cd", low
        self.boundary = path_boundary if boundary == "auto" else boundary
        if self.boundary not in ends:
            raise ValueError(
                f"boundary: expected 'auto' or one of {sorted(ends)} on a {type(path).__name__}, "
                f"got {boundary!r}. lcm is for VP tables, cd for VE paths; a flow path needs none."
            )
        self.scale = scale if self.boundary == "lcm" else None
        ends_at = path.sigma_min if isinstance(path, VEPath) and self.boundary == "cd" else None
        self.sigma_min = ends_at
        self.end = ends[self.boundary]
        uniform = torch.arange(1, num_grid + 1, dtype=torch.float64) / num_grid
        self.starts = low + (1.0 - low) * shift_times(uniform, setting.shift)
        self.stops = torch.cat([torch.tensor([self.end], dtype=torch.float64), self.starts[:-1]])

    def pair(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(t, s), each (B,) float64: start and stop of grid interval `index` (B,)."""
        return self.starts.to(index.device)[index], self.stops.to(index.device)[index]

    def visit(self, num_steps: int) -> tuple[float, ...]:
        """The descending grid times that a sampler of num_steps calls the network at.

        Source: on a table LCMScheduler.set_timesteps: floor(linspace(0, K, num_steps,
        endpoint=False)) of the descending grid; K = 50 gives indices 999 / 999, 499 / 999, 759,
        499, 259. Elsewhere every (K // num_steps)-th, as LCM's first pipeline and consistency
        models have it: a shift of them is a shifted uniform grid, which saved configs reach.
        Errors: ValueError with more steps than grid points.
        """
        descending: list[float] = self.starts.flip(0).tolist()
        if not 1 <= num_steps <= len(descending):
            raise ValueError(
                f"num_steps: expected 1 to {len(descending)} (the trained grid), got {num_steps}."
            )
        stride = len(descending) / num_steps
        if not isinstance(self.path, VPPath):
            stride = len(descending) // num_steps
        return tuple(descending[math.floor(i * stride)] for i in range(num_steps))

    def blend(self, pred: Prediction) -> Tensor:
        """f (B, C, *S) of the consistency function; bit-exactly x_t at the end time."""
        f = boundary_x0(pred, self.scale, self.sigma_min)
        return torch.where(rows(pred.t <= self.end, f), full(pred.x_t), f)


@torch.no_grad()
def heun_step(
    teacher: Denoiser,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Cond,
    null: Cond | None,
    guidance: float | Tensor | None,
) -> Tensor:
    """x_s (B, C, *S) after one second-order step of the guided teacher, without gradients.

    Source: Karras et al. 2022, arXiv:2206.00364, Alg. 1, on VE paths; elsewhere the same rule on
    dx/dt = flow in x / (alpha + sigma), t = sigma / (alpha + sigma), finite at alpha = 0. Rows
    with s = 0 take the Euler step, as there.
    """
    path = teacher.path
    slope: Literal["eps", "flow"] = "eps" if isinstance(path, VEPath) else "flow"
    pred = teacher(x_t, t, cond, null, guidance)
    euler = pred.step(s)
    clean = s <= 0.0
    later = teacher(euler, torch.where(clean, t, s), cond, null, guidance)
    mean = 0.5 * (pred.as_type(slope) + later.as_type(slope))
    heun = path.step(path.to_x0(mean, x_t, t, slope), x_t, t, s)
    return torch.where(rows(clean, heun), euler, heun)
