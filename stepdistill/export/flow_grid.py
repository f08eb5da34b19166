"""Saved configs with which stock flow schedulers visit a trained grid by its step count alone.

FlowMatch schedulers take linspace(1, sigma_min, N) (the last call wasted), shift it by k', then
stretch 1 - t so that the last time is shift_terminal. With y_i = i / N, a uniform grid shifted by k
has 1 - t_i proportional to y_i / (1 - q y_i) where q = 1 - 1/k; theirs has the same form. So a k'
with equal curvature, and shift_terminal = t_last, gives every shifted uniform grid exactly. Calls
that send linspace(1, 1/N, N) leave out sigma_min and stretch by the same rule.
"""

from __future__ import annotations

import math

SIGMA_MIN = 1e-3  # the scheduler's own last time before its shift
MAX_SHIFT = 30.0  # beyond it the shifted sigma_min grows faster than the curvature


def shift_of_grid(times: tuple[float, ...]) -> float:
    """The shift k that maps the uniform grid onto the last of N times; 1 for one step."""
    num, last = len(times), times[-1]
    return 1.0 if num == 1 else last * (num - 1) / (1.0 - last)


def flow_match_config(times: tuple[float, ...], sent: bool = False) -> dict[str, float]:
    """shift and shift_terminal for N = len(times) steps; exact for shifted uniform grids.

    Args: sent: the call hands the scheduler linspace(1, 1/N, N).
    The caller checks the schedule: no config gives an arbitrary grid of four or more times, or one
    that does not begin at 1.
    """
    num = len(times)
    if num == 1:  # stretching divides by 1 - t of the last time, here 0
        return {"shift": 1.0}
    if num == 2:
        return {"shift": 1.0, "shift_terminal": times[-1]}
    first, second = 1.0 - times[1], 1.0 - times[2]
    # second / first = 2 (1 - q) / (1 - 2 q), q the curvature of one grid step
    curvature = (second - 2.0 * first) / (2.0 * (second - first))
    shift = 1.0 / max(1.0 - num * curvature, 1e-9) if sent else _shift_with(curvature, num)
    return {"shift": shift, "shift_terminal": times[-1]}


def _shift_with(curvature: float, num: int) -> float:
    """k' with (1 - 1/k') (1 - sigma_min(k')) / (N - 1) = curvature, by bisection on log k'."""
    if abs(curvature) < 1e-9:
        return 1.0
    low, high = -math.log(1.0 / SIGMA_MIN), math.log(MAX_SHIFT)
    for _ in range(100):
        middle = 0.5 * (low + high)
        shift = math.exp(middle)
        last = shift * SIGMA_MIN / (1.0 + (shift - 1.0) * SIGMA_MIN)
        below = (1.0 - 1.0 / shift) * (1.0 - last) / (num - 1) < curvature
        low, high = (middle, high) if below else (low, middle)
    return math.exp(0.5 * (low + high))
