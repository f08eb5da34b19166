"""Progressive distillation: the target of one student step that replaces two teacher steps.

The student at x_u must jump straight to the x_s that two teacher steps reach, u > s. The universal
step is affine in x0, so exactly one x0 does that. Source: Salimans & Ho 2022, arXiv:2202.00512,
Alg. 2 and Sec. 4. In rectified-flow coordinates x / (alpha + sigma) it is the secant's slope.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). u, s: (B,).

from __future__ import annotations

from typing import Literal

from torch import Tensor

from stepdistill.core.path import NoisePath, expand, full

HalvingWeight = Literal["snr_trunc", "1+snr", "flow"]


def progressive_target(path: NoisePath, x_u: Tensor, x_s: Tensor, u: Tensor, s: Tensor) -> Tensor:
    """x0 (B, C, *S) whose deterministic step from x_u at u is x_s at s < u.

    (x_s - r x_u) / (alpha_s - r alpha_u), r = sigma_s / sigma_u. At s = 0 it is x_s itself, the
    teacher's own x0 (their case i = 0).
    """
    x_u, x_s = full(x_u), full(x_s)
    (alpha_u, sigma_u), (alpha_s, sigma_s) = path.coeffs(u), path.coeffs(s)
    ratio = sigma_s / sigma_u
    return (x_s - expand(ratio, x_u) * x_u) / expand(alpha_s - ratio * alpha_u, x_u)


def progressive_weight(name: HalvingWeight, path: NoisePath, u: Tensor) -> Tensor:
    """(B,) float64 weight of the squared error of x0 at u.

    snr_trunc: max(SNR, 1), the larger of the errors of x0 and eps; 1+snr: the error of v on a VP
    path (both of Sec. 4); flow: the error of flow = eps - x0, (1 + alpha / sigma)^2.
    """
    alpha, sigma = path.coeffs(u)
    ratio = alpha / sigma
    if name == "snr_trunc":
        return (ratio**2).clamp_min(1.0)
    if name == "1+snr":
        return 1.0 + ratio**2
    if name == "flow":
        return (1.0 + ratio) ** 2
    raise ValueError(f"progressive_weight: expected 'snr_trunc', '1+snr' or 'flow', got {name!r}.")
