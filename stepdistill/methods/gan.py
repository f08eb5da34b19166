"""The adversarial part of score distillation: a head on a denoiser's features of noised samples.

Source: Yin et al. 2024, arXiv:2405.14867, Sec. 4.3 (head on the fake denoiser, which it trains
too); Sauer et al. 2024, arXiv:2403.12015 (head on the frozen teacher).
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K heads. t: (B,).

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

from pydantic import Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from stepdistill.core.context import Ctx
from stepdistill.core.method import MethodConfig, Nets, Role
from stepdistill.core.path import NoisePath
from stepdistill.core.types import Cond
from stepdistill.losses.adversarial import (
    AdversarialLoss,
    approximate_r1,
    discriminator_loss,
    exact_r1,
)
from stepdistill.methods.rollout import Sample

Noised = tuple[Tensor, Tensor, Cond]  # x_t (B, C, *S), t (B,) and the condition


class GANConfig(MethodConfig):
    """Off unless weight_g > 0. Needs real images."""

    weight_g: float = Field(default=0.0, ge=0)
    """Weight of the generator loss beside the distribution-matching loss; 0 turns the GAN off."""
    weight_d: float = Field(default=1e-2, ge=0)
    """Weight of the discriminator loss beside the fake's denoising loss."""
    source: Literal["fake", "teacher"] = "fake"
    """Whose features the head reads: the fake's (trained by it too) or the frozen teacher's."""
    blocks: tuple[str, ...] = Field(default=("mid",), min_length=1)
    """Feature blocks, by the model family's names, or "all" of them."""
    heads_per_block: int = Field(default=1, ge=1)
    """Logits of each block, every one by a head of its own (PCM's code has 4 on SD1.5)."""
    loss: AdversarialLoss = "softplus"
    """softplus (non-saturating), hinge, or clipped_hinge (the generator's stops at the margin)."""
    r1_weight: float = Field(default=0.0, ge=0)
    """Weight of R1 on real samples, inside weight_d; of the approximate one 100 to 1000 are used,
    of the exact one about r1_noise^2 times that."""
    r1: Literal["approximate", "exact"] = "approximate"
    """R1 by a perturbed input, or by the second derivative: exact, at more memory and time, with
    attention that has one (torch's plain kernel)."""
    r1_noise: float = Field(default=0.1, ge=0)
    """Standard deviation of the approximate one's input perturbation."""
    same_noise: bool = False
    """Noise real and fake samples with one draw of time and noise, not one each."""

    @property
    def enabled(self) -> bool:
        return self.weight_g > 0.0

    def roles(self) -> dict[str, Role]:
        """The head's role, or none where the GAN is off."""
        head = Role(
            source="head", train=True, features=self.blocks, heads_per_block=self.heads_per_block
        )
        return {"disc": head} if self.enabled else {}


def head_logits(nets: Nets, gan: GANConfig, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """(B, K) logits at noised samples; gradients reach x_t through the features."""
    return nets.head("disc", nets[gan.source].features(x_t, t, cond, gan.blocks))


def disc_loss(
    nets: Nets,
    gan: GANConfig,
    ctx: Ctx,
    path: NoisePath,
    real: Sample,
    fake: Sample,
    draw_times: Callable[[], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss (before weight_d), and its parts to log.

    Args: draw_times: () -> (B,) noise levels, called once for each side (or once for both).
    """
    t, noise = draw_times(), ctx.randn(tuple(fake.x0.shape))
    noised_fake = (path.add_noise(fake.x0, noise, t), t, fake.cond)
    if not gan.same_noise:
        t, noise = draw_times(), ctx.randn(tuple(real.x0.shape))
    noised_real = (path.add_noise(real.x0, noise, t), t, real.cond)
    return noised_disc_loss(nets, gan, ctx, noised_real, noised_fake)


def noised_disc_loss(
    nets: Nets, gan: GANConfig, ctx: Ctx, real: Noised, fake: Noised
) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss (before weight_d) on noised samples, and its parts to log."""
    logits_fake = head_logits(nets, gan, *fake)
    x_t, t, cond = real
    exact = gan.r1_weight > 0.0 and gan.r1 == "exact"
    if exact:
        x_t = x_t.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
        logits_real = head_logits(nets, gan, x_t, t, cond)
    total = discriminator_loss(logits_real, logits_fake, gan.loss)
    logs = {"gan_d": total, "logit_real": logits_real.mean(), "logit_fake": logits_fake.mean()}
    if gan.r1_weight > 0.0:
        if exact:
            try:
                r1 = exact_r1(logits_real, x_t)
            except CheckpointError as err:
                raise ValueError(
                    "gan.r1: expected no gradient_checkpointing with 'exact' (blocks are run again "
                    "with attention kernels that have no second derivative), got it. Set r1: "
                    "approximate, or turn checkpointing off."
                ) from err
        else:
            near = x_t + gan.r1_noise * ctx.randn(tuple(x_t.shape))
            r1 = approximate_r1(logits_real, head_logits(nets, gan, near, t, cond))
        total, logs = total + gan.r1_weight * r1, {**logs, "r1": r1}
    return total, logs
