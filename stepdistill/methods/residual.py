"""The residual of the flow map, D = v - u - (tau - rho) du/dtau, along the teacher's velocity v.

In rectified-flow coordinates y = x_t / (alpha + sigma), tau = sigma / (alpha + sigma), of every
path: there u and v are `.flow`, the teacher's step is Euler's, and D = 0 at the average velocity
u = (y - y_rho) / (tau - rho). A network answers at its own times t and r of them.
    backward   du/dtau = (u(y, tau) - u(y', tau - h)) / h, y' the teacher's own step: error O(h)
    alphaflow  D = ((a v + (1 - a) u(y', tau')) - u) / a, tau' = tau - a (tau - rho): error O(a)
    jvp        forward-mode derivative along (v, 1, 0): exact
Sources: Geng et al. 2025, arXiv:2505.13447, Eq. 6-11; Zhang et al. 2025 (AlphaFlow),
arXiv:2510.20771, Eq. 11, of which the first two differ by 1 in one factor.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t, r, s: (B,).

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.core.denoiser import Prediction
from stepdistill.core.path import expand, flow_time, full
from stepdistill.methods.grid import earlier_time
from stepdistill.methods.meanflow_config import MeanFlowConfig

Average = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> u (B, C, *S), at a fixed r


def scm_weight(tau: Tensor) -> Tensor:
    """(B,) sCM's prior 1 / tan t of a loss in TrigFlow's F, as a weight on D.

    tan t = tau / (1 - tau), and F - F_teacher = (u - v) / (sin t + cos t).
    Source: Lu and Song 2024, arXiv:2410.11081, Eq. 8, with sigma_data 1.
    """
    return (1.0 - tau) / tau * (tau**2 + (1.0 - tau) ** 2).sqrt()


def residual_weight(config: MeanFlowConfig, tau: Tensor, size: Tensor) -> Tensor:
    """(B,) weight of D at rectified-flow times tau (B,). Args: size: (B,) mean squares of D."""
    weight = (size.sqrt() + config.norm_c) ** -config.norm_power
    return weight if config.time_weight == "none" else weight * scm_weight(tau)


@torch.no_grad()
def residual(
    config: MeanFlowConfig, step: int, average: Average, real: Prediction, u: Tensor, r: Tensor
) -> Tensor:
    """D (B, C, *S) without graph, by the config's estimator at student update `step`.

    Args: real: the teacher's (guided) prediction at x_t. u: (B, C, *S) the student's average there.
    """
    path, t, k = real.path, real.t, config.ramp(step)
    tau, v = flow_time(path, t), real.flow
    gap = tau - flow_time(path, r)
    if config.estimator == "jvp":
        return v - u - expand(k * gap, u) * forward_derivative(average, real)
    interpolates = config.estimator == "alphaflow"
    span = config.ratio(step) * gap if interpolates else (0.5 * gap).clamp_max(config.h)
    s = earlier_time(path, t, r, span)
    share = (tau - flow_time(path, s)) / gap.clamp_min(1e-9)  # h / (tau - rho), on the table
    # No difference without a time between t and r: at r, the edge of a phase, the student already
    # answers for the phase below.
    inverse = torch.where((share > 0.0) & (s > r), 1.0 / share.clamp_min(1e-9), 0.0)
    factor = (inverse - 1.0).clamp_min(0.0) * (span < gap) if interpolates else k * inverse
    return v - u - expand(factor, u) * (u - average(real.step(s), s))


def forward_derivative(average: Average, real: Prediction) -> Tensor:
    """du/dtau (B, C, *S) along the teacher's velocity by a Jacobian-vector product."""
    path, t, one = real.path, real.t, torch.ones_like(real.t)

    def scale(t: Tensor, like: Tensor) -> Tensor:
        alpha, sigma = path.coeffs(t)
        return expand(alpha + sigma, like)

    def of(t: Tensor, y: Tensor) -> Tensor:
        return average(scale(t, y) * y, t)

    pace = torch.func.jvp(lambda t: flow_time(path, t), (t,), (one,))[1]  # dtau/dt
    y, pace = full(real.x_t) / scale(t, full(real.x_t)), expand(pace, real.flow)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward mode
        change: Tensor = torch.func.jvp(of, (t, y), (one, pace * real.flow))[1]
    return change / pace
