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

ROWS = 1024  # of a distance matrix at a time


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
    Notes: time is N * M * D; meant for some thousands of samples.
    """
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or len(features) <= k:
            raise ValueError(
                f"{name}: expected features of shape (N > k = {k}, D), got "
                f"{tuple(features.shape)}. Use more samples or a smaller k."
            )
    real, generated = real.double(), generated.double()
    real_radius, generated_radius = _radii(real, k), _radii(generated, k)
    balls = torch.zeros(len(generated), dtype=torch.long)  # (M,) real balls that hold each point
    reached, covered = [], []
    for rows, radius in zip(real.split(ROWS), real_radius.split(ROWS), strict=True):
        distance = _distance(rows, generated)  # (ROWS, M)
        in_real = distance <= radius[:, None]
        balls += in_real.sum(0)
        covered.append(in_real.any(1))
        reached.append((distance <= generated_radius[None, :]).any(1))
    return ManifoldScores(
        precision=float((balls > 0).double().mean()),
        recall=float(torch.cat(reached).double().mean()),
        density=float(balls.double().mean() / k),
        coverage=float(torch.cat(covered).double().mean()),
    )


def _radii(points: Tensor, k: int) -> Tensor:
    """(N,) distance of each point to its k-th neighbour; rank 0 is the point itself."""
    parts = [_distance(rows, points).kthvalue(k + 1, dim=1).values for rows in points.split(ROWS)]
    return torch.cat(parts)


def _distance(x: Tensor, y: Tensor) -> Tensor:
    # Without the matrix-multiply shortcut a point is at exactly distance 0 from its copy.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
