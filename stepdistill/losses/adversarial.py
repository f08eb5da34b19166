"""Adversarial losses on discriminator logits: real high, fake low.

With the softplus pair the optimal logit is log p_real / p_fake, which is what f-distill reads.
Sources: Goodfellow et al. 2014, arXiv:1406.2661 (non-saturating); Lim & Ye 2017, arXiv:1705.02894
(hinge); Mescheder et al. 2018, arXiv:1801.04406 (R1); Lin et al. 2025, arXiv:2501.08316
(approximate R1); Sauer et al. 2023, arXiv:2311.17042 (R1 of a head's own input).
"""

# Shapes: B batch, K heads. Any logit shape works: losses are means over all elements.

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

AdversarialLoss = Literal["softplus", "hinge", "clipped_hinge"]


def discriminator_loss(real: Tensor, fake: Tensor, kind: AdversarialLoss = "softplus") -> Tensor:
    """Loss of the discriminator on logits of real and fake samples, (B, K) each.

    softplus: E[softplus(-real)] + E[softplus(fake)], 2 log 2 where it can't tell them apart.
    hinge:    E[relu(1 - real)] + E[relu(1 + fake)], 2 at logit 0; clipped_hinge is the same here.
    """
    real, fake = real.float(), fake.float()
    if kind == "softplus":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    if kind in ("hinge", "clipped_hinge"):
        return F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean()
    raise ValueError(
        f"discriminator_loss: expected softplus, hinge or clipped_hinge, got {kind!r}."
    )


def generator_loss(fake: Tensor, kind: AdversarialLoss = "softplus") -> Tensor:
    """Loss of the generator on the logits (B, K) of its samples: push them up.

    softplus: E[softplus(-fake)], non-saturating. hinge: -E[fake].
    clipped_hinge: E[relu(1 - fake)], no push beyond the margin (PCM, arXiv:2405.18407, code).
    """
    if kind == "softplus":
        return F.softplus(-fake.float()).mean()
    if kind == "hinge":
        return -fake.float().mean()
    if kind == "clipped_hinge":
        return F.relu(1.0 - fake.float()).mean()
    raise ValueError(f"generator_loss: expected softplus, hinge or clipped_hinge, got {kind!r}.")


def approximate_r1(logits: Tensor, perturbed: Tensor) -> Tensor:
    """E[(D(x) - D(x + noise))^2], R1 without a second derivative.

    Args: logits, perturbed: (B, K) at real inputs and at the same inputs plus small Gaussian noise.
    Notes: about noise_std^2 |dD/dx|^2, so weights of 100 to 1000 go with noise_std 0.1.
    """
    return F.mse_loss(logits.float(), perturbed.float())


def exact_r1(logits: Tensor, x: Tensor | Sequence[Tensor]) -> Tensor:
    """E[|dD/dx|^2] over samples and heads, with a graph for the second derivative.

    Args: logits: (B, K) at real inputs x (B, ...), which must carry gradients; several inputs, of
        which a head may read one alone, count as one (ADD's R1 of what heads read).
    Notes: `approximate_r1` is about noise_std^2 times this.
    """
    inputs = [x] if isinstance(x, Tensor) else [*x]
    total = torch.zeros((), device=logits.device)
    for head in logits.float().unbind(1):
        slopes = torch.autograd.grad(
            head.sum(), inputs, create_graph=True, allow_unused=len(inputs) > 1
        )
        for slope in slopes:
            if slope is not None:
                total = total + slope.float().square().flatten(1).sum(1).mean()
    return total / logits.shape[1]
