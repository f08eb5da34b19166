"""Discriminator heads and their losses: on a denoiser's features of noised samples, or on those of
a frozen pixel network.

Sources: Yin et al. 2024, arXiv:2405.14867, Sec. 4.3 (head on the fake denoiser, which it trains
too); Sauer et al. 2024, arXiv:2403.12015 (heads on the frozen teacher); Sauer et al. 2023,
arXiv:2311.17042 (heads on a pixel network, of decoded samples); Chen et al. 2025, arXiv:2503.09641
(real samples under other prompts as fakes).
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), H, W image size in px, K heads. t: (B,).

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointError

from stepdistill.core.context import Ctx
from stepdistill.core.method import MethodConfig, Nets, PixelNet, Role, ScorerSpec
from stepdistill.core.path import NoisePath
from stepdistill.core.types import Cond
from stepdistill.losses.adversarial import (
    AdversarialLoss,
    approximate_r1,
    discriminator_loss,
    exact_r1,
)
from stepdistill.losses.pixels import PixelOptions
from stepdistill.methods.grid import drawn_times
from stepdistill.methods.rollout import Sample

# What a head's network sees: x_t (B, C, *S), or images (B, 3, H, W); t (B,); and the condition.
Noised = tuple[Tensor, Tensor, Cond]
PIXELS = "pixels"  # the method's name for its pixel network among the run's scorers


class HeadConfig(MethodConfig):
    """Heads and their losses, off unless weight_g > 0; GANConfig adds where samples are judged."""

    weight_g: float = Field(default=0.0, ge=0)
    """Weight of the generator loss beside the distribution-matching loss; 0 turns the GAN off."""
    weight_d: float = Field(default=1e-2, ge=0)
    """Weight of the discriminator loss beside the fake's denoising loss."""
    source: Literal["fake", "teacher", "pixels"] = "fake"
    """Whose features the head reads: the fake's (trained by it too), the frozen teacher's, or those
    of a frozen pixel network on decoded samples, which know neither noise nor prompt."""
    blocks: tuple[str, ...] = Field(default=("mid",), min_length=1)
    """Feature blocks, by the names of the model family (or mid and block.N of a pixel network), or
    "all" of them."""
    heads_per_block: int = Field(default=1, ge=1)
    """Logits of each block, every one by a head of its own (PCM's code has 4 on SD1.5)."""
    loss: AdversarialLoss = "softplus"
    """softplus (non-saturating), hinge, or clipped_hinge (the generator's stops at the margin)."""
    r1_weight: float = Field(default=0.0, ge=0)
    """Weight of R1 on real samples, inside weight_d; of the approximate one 100 to 1000 are used,
    of the exact one about r1_noise^2 times that, of features about 1e-5."""
    r1: Literal["approximate", "exact", "features"] = "approximate"
    """R1 by a perturbed input, or by the second derivative: exact, at more memory and time, with
    attention that has one (torch's plain kernel); of features, through the heads alone (ADD)."""
    r1_noise: float = Field(default=0.1, ge=0)
    """Standard deviation of the approximate one's input perturbation."""
    same_noise: bool = False
    """Noise real and fake samples with one draw of time and noise, not one each."""
    mismatched: bool = False
    """Show the head real samples under their neighbour's prompt as further fakes (SANA-Sprint), in
    batches of two and more; not on a pixel network, which sees no prompt."""

    @property
    def enabled(self) -> bool:
        return self.weight_g > 0.0

    def roles(self) -> dict[str, Role]:
        """The head's role, or none where the GAN is off."""
        head = Role(
            source="head",
            train=True,
            features=self.blocks,
            heads_per_block=self.heads_per_block,
            reads=PIXELS if self.source == "pixels" else "",
        )
        return {"disc": head} if self.enabled else {}


class GANConfig(HeadConfig):
    """Off unless weight_g > 0. Needs real images."""

    time_mean: float | None = None
    """Mean of the logit-normal law of rectified-flow times that samples are noised to; none means
    the method's own law. High times judge layout, low ones texture (LADD: 1)."""
    time_std: float = Field(default=1.0, gt=0)
    """Standard deviation of that law; read with time_mean alone."""
    same_times: bool = False
    """Noise real and fake samples to the same times, each with its own noise."""
    pixels: PixelOptions = PixelOptions()
    """The pixel network of source pixels."""

    @model_validator(mode="after")
    def _check_heads(self) -> GANConfig:
        if self.source != "pixels":
            return self
        if self.mismatched:
            raise ValueError(
                "mismatched: expected false with source pixels (its network sees no prompt), got "
                "true. Set gan.source: teacher, or leave it out."
            )
        if idle := self.changed("time_mean", "same_times", "same_noise"):
            warnings.warn(
                f"gan: {', '.join(idle)} has no effect: a pixel network sees no noise.",
                stacklevel=2,
            )
        return self

    def scorers(self) -> dict[str, ScorerSpec]:
        """The pixel network, or none where the heads read none."""
        wanted = self.enabled and self.source == "pixels"
        return {PIXELS: self.pixels.spec} if wanted else {}

    def law(self, path: NoisePath, ctx: Ctx, bsz: int) -> Tensor | None:
        """(B,) float64 noise levels of the law that time_mean states; None where it states none."""
        if self.time_mean is None:
            return None
        return drawn_times(path, ctx.stratified(bsz), self.time_mean, self.time_std)


def head_features(
    nets: Nets, gan: HeadConfig, x: Tensor, t: Tensor, cond: Cond
) -> Mapping[str, Tensor]:
    """The features that the heads read at x, which gradients reach through them."""
    if gan.source == "pixels":
        return cast(PixelNet, nets.scorer(PIXELS)).features(x, gan.blocks)
    return nets[gan.source].features(x, t, cond, gan.blocks)


def head_logits(nets: Nets, gan: HeadConfig, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """(B, K) logits of what the heads' network sees; gradients reach x through the features."""
    return nets.head("disc", head_features(nets, gan, x, t, cond))


def as_images(nets: Nets, ctx: Ctx, sample: Sample) -> Noised:
    """What a pixel network sees of a sample: its image, at no noise."""
    return nets.images(sample.x0), ctx.times(0.0, len(sample.x0)), sample.cond


def disc_loss(
    nets: Nets,
    gan: HeadConfig,
    ctx: Ctx,
    path: NoisePath,
    real: Sample,
    fake: Sample,
    draw_times: Callable[[], Tensor],
    same_times: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss (before weight_d), and its parts to log.

    Args:
        draw_times: () -> (B,) noise levels, called once for each side (or once for both).
        same_times: one draw of noise levels, each side with its own noise.
    """
    if gan.source == "pixels":
        sides = as_images(nets, ctx, real), as_images(nets, ctx, fake)
        return noised_disc_loss(nets, gan, ctx, *sides)
    t, noise = draw_times(), ctx.randn(tuple(fake.x0.shape))
    noised_fake = (path.add_noise(fake.x0, noise, t), t, fake.cond)
    if not gan.same_noise:
        t = t if same_times else draw_times()
        noise = ctx.randn(tuple(real.x0.shape))
    noised_real = (path.add_noise(real.x0, noise, t), t, real.cond)
    return noised_disc_loss(nets, gan, ctx, noised_real, noised_fake)


def noised_disc_loss(
    nets: Nets, gan: HeadConfig, ctx: Ctx, real: Noised, fake: Noised
) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminator's loss (before weight_d) on noised samples, and its parts to log."""
    x_t, t, cond = real
    if gan.mismatched and len(x_t) > 1:
        x, times, conds = fake
        fake = (
            torch.cat([x, x_t.detach().roll(1, 0)]),
            torch.cat([times, t.roll(1, 0)]),
            Cond.cat([conds, cond]),
        )
    logits_fake = head_logits(nets, gan, *fake)
    exact = gan.r1_weight > 0.0 and gan.r1 == "exact"
    if exact:
        x_t = x_t.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH) if exact else nullcontext():
        features = head_features(nets, gan, x_t, t, cond)
    if gan.r1_weight > 0.0 and gan.r1 == "features":
        features = {
            name: value if value.requires_grad else value.detach().requires_grad_()
            for name, value in features.items()
        }
    logits_real = nets.head("disc", features)
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
        elif gan.r1 == "features":
            r1 = exact_r1(logits_real, [*features.values()])
        else:
            near = x_t + gan.r1_noise * ctx.randn(tuple(x_t.shape))
            r1 = approximate_r1(logits_real, head_logits(nets, gan, near, t, cond))
        total, logs = total + gan.r1_weight * r1, {**logs, "r1": r1}
    return total, logs
