"""Precision, recall, density and coverage from k-nearest-neighbour balls.

A set's manifold is the union of balls around its points, each reaching to the point's k-th
neighbour inside the set. Precision and density ask whether generated points lie on the real
manifold (quality); recall and coverage ask whether the real points are reached (diversity).

Sources: Kynkaanniemi et al. 2019, arXiv:1904.06991 (precision, recall);
Naeem et al. 2020, arXiv:2002.09797 (density, coverage).
"""

# N, M samples, D feature width

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ManifoldScores:
    """Precision, recall and coverage lie in [0, 1]; density may exceed 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_scores(real: Tensor, generated: Tensor, k: int = 3) -> ManifoldScores:
    """Precision, recall, density and coverage of `generated` against `real`.

    Args:  real (N, D), generated (M, D): features of one network; k: neighbour rank, the point
           itself not counted.
    Notes: memory is N * M; meant for some thousands of samples.
    """
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or len(features) <= k:
            raise ValueError(
                f"{name}: expected features of shape (N > k = {k}, D), got "
                f"{tuple(features.shape)}. Use more samples or a smaller k."
            )
    real, generated = real.double(), generated.double()
    real_radius, generated_radius = _radii(real, k), _radii(generated, k)
    distance = torch.cdist(real, generated, compute_mode="donot_use_mm_for_euclid_dist")  # (N, M)
    in_real = distance <= real_radius[:, None]
    in_generated = distance <= generated_radius[None, :]
    return ManifoldScores(
        precision=float(in_real.any(0).double().mean()),
        recall=float(in_generated.any(1).double().mean()),
        density=float(in_real.double().sum(0).mean() / k),
        coverage=float(in_real.any(1).double().mean()),
    )


def _radii(points: Tensor, k: int) -> Tensor:
    """(N,) distance of each point to its k-th neighbour; rank 0 is the point itself."""
    # Without the matrix-multiply shortcut a point is at exactly distance 0 from its copy.
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.kthvalue(k + 1, dim=1).values
