"""The distance of two clean samples that regressions on pairs share: latents, images, or both."""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from stepdistill.core.method import Nets
from stepdistill.losses.regression import DistanceName, distance, per_sample, sample_huber

PairDistance = DistanceName | Literal["lpips", "l2_lpips", "norm"]


def judged(kind: PairDistance) -> bool:
    """Whether the scorer "lpips" judges decoded images."""
    return kind in ("lpips", "l2_lpips")


def pair_distance(
    nets: Nets, kind: PairDistance, x0: Tensor, target: Tensor, huber_c: float
) -> Tensor:
    """(B,) distance of x0 to a target, both (B, C, *S); the target gets no gradient.

    "norm" is a sample's root mean square, not squared, smoothed by huber_c (ECT's).
    """
    if kind == "lpips" or kind == "l2_lpips":
        with torch.no_grad():
            reference = nets.images(target)
        lpips = nets.scorer("lpips")(nets.images(x0), reference)
        return lpips if kind == "lpips" else lpips + pair_distance(nets, "l2", x0, target, huber_c)
    if kind == "norm":
        return sample_huber(x0, target.detach(), huber_c)
    return per_sample(distance(kind, x0, target.detach(), huber_c))
