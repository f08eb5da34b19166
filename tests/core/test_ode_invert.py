"""Heun's rule from clean data up to noise, against the same sums written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.path import FlowPath, NoisePath, VEPath, VPPath
from stepdistill.core.solvers import ode_invert
from stepdistill.core.types import Cond

VP = VPPath.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2)
X0 = torch.tensor([0.4, -1.5], dtype=torch.float64).view(2, 1, 1, 1)


class Linear(Denoiser):
    """Its flow is 0.3 x + t; it notes the times it was asked at."""

    kind = "flow"

    def __init__(self, path: NoisePath) -> None:
        self.path = path
        self.times: list[float] = []

    def raw(self, x_t, t, cond, w, features) -> tuple[Tensor, dict[str, Tensor]]:
        self.times.append(float(t[0]))
        return 0.3 * x_t + t.view(-1, 1, 1, 1), {}


def by_hand(path: NoisePath, x0: float, times: list[float]) -> float:
    """Two rising times."""

    def at(t: float) -> tuple[float, float]:
        alpha, sigma = (float(c[0]) for c in path.coeffs(torch.tensor([t], dtype=torch.float64)))
        return alpha + sigma, sigma / (alpha + sigma)

    (first, last), (scale, tau), (end_scale, end) = times, at(times[0]), at(times[1])
    guess = x0 + tau * -x0
    y = x0 + tau * (-x0 + 0.3 * scale * guess + first) / 2
    slope = 0.3 * scale * y + first
    guess = y + (end - tau) * slope
    y = y + (end - tau) * (slope + 0.3 * end_scale * guess + last) / 2
    return end_scale * y


@pytest.mark.parametrize("path", [VP, FlowPath(), VEPath()], ids=["vp", "flow", "ve"])
def test_two_steps_are_heun_s(path: NoisePath) -> None:
    net = Linear(path)
    found = ode_invert(net, X0, Cond({"x": X0}), times=(0.9, 0.4))
    size = float(path.prior(torch.ones(())))
    expected = [by_hand(path, x0, [0.4, 0.9]) / size for x0 in X0.flatten().tolist()]
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)
    assert net.times == [0.4, 0.4, 0.9], "2 N - 1 calls"


def test_no_time_below_sigma_min_is_asked() -> None:
    path = VEPath(sigma_min=0.1)
    lowest = path.lowest
    net = Linear(path)
    ode_invert(net, X0, Cond({"x": X0}), times=(1.0, lowest, 0.99 * lowest))
    assert net.times == [lowest, lowest, 1.0]
