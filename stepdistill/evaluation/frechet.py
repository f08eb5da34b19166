"""Distances between two sets of feature vectors: Frechet distance and KID.

Both compare distributions, not images: a set of generated images is judged against an equally
large set of real ones through the features of one fixed network.

Sources: Heusel et al. 2017, arXiv:1706.08500 (Frechet distance of two Gaussians);
Binkowski et al. 2018, arXiv:1801.01401 (kernel distance, unbiased estimator).
The Frechet distance is biased upwards by about 1/N: compare only values taken at the same N.
"""

# N, M samples, D feature width

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 2048  # of a kernel matrix at a time


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Frechet distance between the Gaussians fitted to two feature sets.

    Source: arXiv:1706.08500, Eq. 6: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).
    Args:   real (N, D), generated (M, D); at least two samples each.
    """
    x, y = _checked(real, "real"), _checked(generated, "generated")
    _same_width(x, y)
    return gaussian_frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))


def gaussian_frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians.

    Args:  mean1, mean2 (D,); cov1, cov2 (D, D) or scalars for D = 1.
    Notes: tr (C1 C2)^(1/2) is taken as the sum of the square roots of the eigenvalues of the
           SYMMETRIC C1^(1/2) C2 C1^(1/2), which has the same spectrum. It needs no general matrix
           square root, so rank-deficient covariances (N <= D) give no complex parts.
    """
    m1, m2 = mean1.double().reshape(-1), mean2.double().reshape(-1)
    c1, c2 = (c.double().reshape(m1.numel(), m1.numel()) for c in (cov1, cov2))
    root = _sqrt_psd(c1)
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp_min(0).sqrt().sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(real: Tensor, generated: Tensor) -> float:
    """Unbiased squared MMD with the cubic kernel (x.y / D + 1)^3: the kernel distance (KID).

    Source: arXiv:1801.01401, Eq. 4, on the whole sets (no subset averaging).
    Args:   real (N, D), generated (M, D).
    Notes:  unbiased, so it is below zero about half of the time for equal distributions.
    """
    x, y = _checked(real, "real"), _checked(generated, "generated")
    _same_width(x, y)
    n, m = len(x), len(y)
    within_x = (_cubic_sum(x, x) - _cubic_diagonal(x)) / (n * (n - 1))
    within_y = (_cubic_sum(y, y) - _cubic_diagonal(y)) / (m * (m - 1))
    return within_x + within_y - 2 * _cubic_sum(x, y) / (n * m)


def _cubic_sum(x: Tensor, y: Tensor) -> float:
    """Sum of the kernel over all pairs, some rows at a time: N * M numbers are never held."""
    parts = x.split(ROWS)
    return float(torch.stack([(p @ y.T / x.shape[1] + 1).pow(3).sum() for p in parts]).sum())


def _cubic_diagonal(x: Tensor) -> float:
    return float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())


def _sqrt_psd(matrix: Tensor) -> Tensor:
    """Symmetric square root; eigenvalues below zero are rounding and count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _checked(features: Tensor, name: str) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"{name}: expected features of shape (N >= 2, D), got {tuple(features.shape)}. "
            "Flatten each image's features to one row."
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError(
            f"{name}: expected finite features, got NaN or infinity. Check the images."
        )
    return features.double()


def _same_width(x: Tensor, y: Tensor) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"generated: expected feature width {x.shape[1]} as in real, got {y.shape[1]}. "
            "Use the same feature network for both sets."
        )
