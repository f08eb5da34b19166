"""PSO: the odds that a few-step model prefers the chosen of two images, against itself as it was.

A step of it from x_t is read as N(x0hat(x_t), sigma^2 I), whose log-density falls with the error
    l = mean |x0hat(x_t) - x0|^2 / sigma^2,
a MEAN over the image's d numbers: log-odds in nats are d / 2 times these, so a beta here is 2 beta
/ d a nat, and does not move with the size of images. With w the chosen image, l the rejected one,
noised alike, D = l_w - k l_l of the tuned model and D_ref of the model before:
    loss = -log sigmoid(beta (D_ref - D)).
Source: Miao et al. 2024, arXiv:2410.03190, its offline form as released.
"""

# Shapes: B pairs, C channels, *S spatial or (F, H, W).

from __future__ import annotations

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
