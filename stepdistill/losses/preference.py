"""PSO: the odds that a few-step model prefers the chosen of two images, against itself as it was.

A step of it from x_t is read as N(x0hat(x_t), sigma^2 I), whose log-density falls with the error
    l = mean |x0hat(x_t) - x0|^2 / sigma^2,
a MEAN over the image's d numbers: log-odds in nats are d / 2 times these, so a beta here is 2 beta
/ d a nat, and does not move with the size of images. With w the chosen image, l the rejected one,
noised alike, D = l_w - k l_l of the tuned model and D_ref of the model before:
    loss = -log sigmoid(beta (D_ref - D)).
Online the two images are the model's own, and a step's log-density is that of what it drew.
Source: Miao et al. 2024, arXiv:2410.03190, as released.
"""

# Shapes: B pairs, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid

from stepdistill.losses.regression import per_sample, squared_error

FLAT = 0.01  # of the steepest slope: a pair below it hardly moves anything any more


def pair_errors(x0hat: Tensor, x0: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """((B,), (B,)) the mean errors l of chosen and rejected images.

    Args: x0hat, x0: (2B, C, *S), the B chosen first. weight: (2B,) sigma^-2.
    """
    errors = per_sample(squared_error(x0hat, x0))
    chosen, rejected = (weight.to(errors.dtype) * errors).chunk(2)
    return chosen, rejected


def preference_gap(errors: tuple[Tensor, Tensor], rejected_weight: float) -> Tensor:
    """D (B,) = l_w - k l_l, the lower the more the chosen image is preferred."""
    return errors[0] - rejected_weight * errors[1]


def logistic(gap: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, margins, whether flat), each (B,); ln 2 and 0 where the model is the reference.

    Args: gap, reference: (B,) D and D_ref.
    """
    margin = beta * (reference - gap)
    return -logsigmoid(margin), margin, (-margin).sigmoid() < FLAT


def hinge(
    errors: tuple[Tensor, Tensor], gap: Tensor, beta: float, prior_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(1 + beta D) + prior_weight l_l without a reference (released as pso_db), as `logistic`.

    The last term holds the model at the rejected images, which are its own: a prior's.
    """
    margin = -beta * gap
    return (1.0 - margin).relu() + prior_weight * errors[1], margin, margin > 1.0


def log_ratio(later: Tensor, mean: Tensor, reference: Tensor, std: Tensor) -> Tensor:
    """(B,) log p / p_ref of a step that drew `later` from N(mean, std^2), as a mean over numbers.

    Args: later, mean, reference: (B, C, *S), of the tuned model and of the model before. std: ().
    """
    farther = per_sample(squared_error(later, reference)) - per_sample(squared_error(later, mean))
    return farther / (2.0 * std.to(farther.dtype) ** 2)


def online(ratio: Tensor, won: Tensor, beta: float, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, margins (B,), whether a ratio is clamped (2B,)) of pairs of the model's own samples;
    ln 2 where the model is the reference, 0 and no gradient where nothing has won.

    Args: ratio: (2B,) log-ratios, the B first samples first. won: (B,) 1 where the first of a pair
        won, -1 where the second did, 0 where neither.
    """
    low, high = math.log1p(-clip), math.log1p(clip)
    one, other = ratio.clamp(low, high).chunk(2)
    margin = beta * won.to(ratio.dtype) * (one - other)
    losses = -logsigmoid(margin) * won.abs().to(ratio.dtype)
    return losses, margin, (ratio < low) | (ratio > high)
