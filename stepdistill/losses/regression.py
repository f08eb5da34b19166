"""Regression distances between a prediction and its target, and their reductions.

Elementwise distances keep the shape; `per_sample` and `weighted_mean` reduce. Everything runs in
float32 or better, whatever dtype a network answered in.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from typing import Literal

from torch import Tensor

from stepdistill.core.path import full

DistanceName = Literal["l2", "l1", "huber"]


def _difference(pred: Tensor, target: Tensor) -> Tensor:
    if pred.shape != target.shape:
        raise ValueError(
            f"regression: expected pred and target of one shape, got {tuple(pred.shape)} and "
            f"{tuple(target.shape)}. Broadcasting would average unrelated samples."
        )
    return full(pred) - full(target)


def squared_error(pred: Tensor, target: Tensor) -> Tensor:
    """(B, C, *S) elementwise e^2."""
    return _difference(pred, target) ** 2


def absolute_error(pred: Tensor, target: Tensor) -> Tensor:
    """(B, C, *S) elementwise |e|."""
    return _difference(pred, target).abs()


def pseudo_huber(pred: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """(B, C, *S) elementwise sqrt(e^2 + c^2) - c: e^2 / 2c for small errors, |e| - c for large.

    Source: LCM's released training script, "huber" with c = 1e-3.
    Notes: computed as e^2 / (sqrt(e^2 + c^2) + c), which loses no digits where |e| << c.
    """
    squared = _difference(pred, target) ** 2
    return squared / ((squared + c**2).sqrt() + c)


def sample_huber(pred: Tensor, target: Tensor, ratio: float = 0.00054) -> Tensor:
    """(B,) (sqrt(|e|^2 + h^2) - h) / d of each sample's d numbers, h = ratio * d.

    Source: Lee et al. 2024, arXiv:2405.20320, as released (iCT's h is ratio * sqrt(d)).
    Notes: |e|^2 / (2 h d) for small errors, |e| / d for large ones.
    """
    error = _difference(pred, target).flatten(1)
    squared, h = (error**2).sum(1), ratio * error.shape[1]
    return squared / ((squared + h**2).sqrt() + h) / error.shape[1]


def distance(name: DistanceName, pred: Tensor, target: Tensor, c: float = 1e-3) -> Tensor:
    """(B, C, *S) the elementwise distance of that name; `c` is read by "huber" alone."""
    if name == "l2":
        return squared_error(pred, target)
    if name == "l1":
        return absolute_error(pred, target)
    if name == "huber":
        return pseudo_huber(pred, target, c)
    raise ValueError(f"distance: expected 'l2', 'l1' or 'huber', got {name!r}.")


def per_sample(elementwise: Tensor) -> Tensor:
    """(B,) mean over all but the batch dimension."""
    return elementwise.flatten(1).mean(1)


def weighted_mean(elementwise: Tensor, weight: Tensor | None = None) -> Tensor:
    """Scalar mean_b( weight_b * mean of sample b ); the plain mean without weights.

    Args: weight: (B,), not normalised here: doubling it doubles the loss.
    """
    values = per_sample(elementwise)
    if weight is None:
        return values.mean()
    if weight.shape != values.shape:
        raise ValueError(
            f"weighted_mean: expected weight of shape (B,) = {tuple(values.shape)}, got "
            f"{tuple(weight.shape)}."
        )
    return (weight.to(values.dtype) * values).mean()
