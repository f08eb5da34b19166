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

ROWS = 1024  # of a distance matrix at a time; memory is that times the other set's size


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
    Notes: time is (N + M)^2 * D; meant for some thousands of samples. A point counts as inside a
           ball whose surface it lies on, up to the rounding of float64.
    """
    for name, features in (("real", real), ("generated", generated)):
        if features.ndim != 2 or len(features) <= k:
            raise ValueError(
                f"{name}: expected features of shape (N > k = {k}, D), got "
                f"{tuple(features.shape)}. Use more samples or a smaller k."
            )
        if not bool(torch.isfinite(features).all()):
            raise ValueError(
                f"{name}: expected finite features, got NaN or infinity. Check the images."
            )
    real, generated = real.double(), generated.double()
    real_radius, generated_radius = _squared_radii(real, k), _squared_radii(generated, k)
    centre = (real.mean(0) + generated.mean(0)) / 2
    real, generated = real - centre, generated - centre
    slack = 8 * (real.shape[1] + 2) * torch.finfo(torch.float64).eps
    balls = torch.zeros(len(generated), dtype=torch.long)  # (M,) real balls that hold each point
    near_real, covered = [], []
    for rows, radius in zip(real.split(ROWS), real_radius.split(ROWS), strict=True):
        distance = _squared_distance(rows, generated, slack)  # (ROWS, M)
        in_real = distance <= radius[:, None]
        balls += in_real.sum(0)
        covered.append(in_real.any(1))
        near_real.append((distance <= generated_radius[None, :]).any(1))
    return ManifoldScores(
        precision=float((balls > 0).double().mean()),
        recall=float(torch.cat(near_real).double().mean()),
        density=float(balls.double().mean() / k),
        coverage=float(torch.cat(covered).double().mean()),
    )


def _squared_radii(points: Tensor, k: int) -> Tensor:
    """(N,) squared distance of each point to its k-th neighbour."""
    points = points - points.mean(0)
    parts = []
    for start in range(0, len(points), ROWS):
        distance = _squared_distance(points[start : start + ROWS], points)
        distance.diagonal(start).fill_(torch.inf)  # itself
        parts.append(distance.kthvalue(k, dim=1).values)
    return torch.cat(parts).clamp_min(0)


def _squared_distance(x: Tensor, y: Tensor, slack: float = 0.0) -> Tensor:
    """(N, M) of centred sets, as |x|^2 + |y|^2 - 2 x.y: a matrix product, where pair by pair costs
    some fifteen times as much.

    Its rounding grows with |x|^2 + |y|^2, so a point isn't quite at 0 from its copy. `slack` times
    that sum is taken off, so that `<=` holds for copies and ties as it does in exact numbers.
    """
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    return norms.mul_(1 - slack).addmm_(x, y.T, alpha=-2)
