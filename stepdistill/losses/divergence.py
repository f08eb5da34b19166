"""f-divergences D_f(p || q) between teacher p and student q: the weight each gives a sample.

With r = p / q at the noised sample, D_f = E_q[f(r)], f convex. For samples x0 = G(z) of q
    grad D_f = -E[h(r) alpha (score_p - score_q) dG],   h(r) = r^2 f''(r),
so every divergence is reverse KL's gradient times h. A discriminator trained with the softplus loss
on noised samples has logit log r.
Source: Xu et al. 2025, arXiv:2502.15681 (f-distill).
Differs from the paper's code: h is exact also for Hellinger (1/4 there is missing) and Neyman (2);
constants vanish when weights are normalised to mean 1.
"""

# Shapes: B batch, K heads, N time bins. t: (B,).

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["rkl", "kl", "js", "sf", "sh", "neyman", "jf"]

MAX_LOGIT = 10.0


def divergence_weight(ratio: Tensor, divergence: Divergence) -> Tensor:
    """h(r) = r^2 f''(r) of each sample, > 0, the shape of `ratio`.

    key     divergence             f(r)                               h(r)
    rkl     reverse KL (DMD)       -log r                             1
    kl      forward KL             r log r                            r
    js      Jensen-Shannon         r log r - (r + 1) log((r + 1)/2)   r / (1 + r)
    sf      softened reverse KL    (r + 1) log((r + 1) / (2 r))       1 / (1 + r)
    sh      squared Hellinger      1 - sqrt r                         sqrt r / 4
    neyman  Neyman chi-squared     (1 - r)^2 / r                      2 / r
    jf      Jeffreys               (r - 1) log r                      1 + r
    """
    if divergence == "rkl":
        return torch.ones_like(ratio)
    if divergence == "kl":
        return ratio
    if divergence == "js":
        return ratio / (1.0 + ratio)
    if divergence == "sf":
        return 1.0 / (1.0 + ratio)
    if divergence == "sh":
        return ratio.sqrt() / 4.0
    if divergence == "neyman":
        return 2.0 / ratio
    if divergence == "jf":
        return 1.0 + ratio
    raise ValueError(
        f"divergence_weight: expected rkl, kl, js, sf, sh, neyman or jf, got {divergence!r}."
    )


def density_ratio(logits: Tensor, clip: tuple[float, float]) -> Tensor:
    """r = p / q (B,) without graph from discriminator logits (B, K), clipped to `clip`.

    Notes: the mean over heads is clamped to +-10 first, so that exp stays finite.
    """
    logit = logits.detach().float().mean(dim=1).clamp(-MAX_LOGIT, MAX_LOGIT)
    return logit.exp().clamp(*clip)


def time_bin(t: Tensor, low: float, high: float, num_bins: int) -> Tensor:
    """(B,) int64 index of the equal bin of [low, high] that each t lies in."""
    return ((t - low) / (high - low) * num_bins).long().clamp(0, num_bins - 1)


def bin_stats(values: Tensor, index: Tensor, num_bins: int) -> Tensor:
    """(2, N): count and sum of the values (B,) in each bin.

    Notes: a product with indicators, not a scatter: sums repeat bit for bit on GPUs too.
    """
    inside = F.one_hot(index, num_bins).to(values)  # (B, N)
    return torch.stack([inside.sum(0), (inside * values[:, None]).sum(0)])


def update_bins(bins: Tensor, stats: Tensor, decay: float) -> Tensor:
    """(N,) moving means: decay * old + (1 - decay) * mean where a bin has values, else the old.

    Args: stats: (2, N) of `bin_stats`; its mean over processes serves as well as its sum.
    """
    count, total = stats
    filled = count > 0
    mean = total / torch.where(filled, count, torch.ones_like(count))
    return torch.where(filled, decay * bins + (1.0 - decay) * mean, bins)
