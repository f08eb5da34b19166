"""Heads beside a student's own loss, with updates of their own: what methods without a fake share.

After each update of the student the heads learn to tell the very x0 that it made from images.
Source: Sauer et al. 2023 and 2024, arXiv:2311.17042 and 2403.12015.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K heads. t: (B,).

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets, Phase
from stepdistill.core.path import NoisePath
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.adversarial import AdversarialLoss, generator_loss
from stepdistill.methods.gan import GANConfig, as_images, disc_loss, head_logits
from stepdistill.methods.rollout import Sample

Times = Callable[[Ctx, int], Tensor]  # (ctx, B) -> (B,) float64 noise levels


class JudgeGAN(GANConfig):
    """Off unless weight_g > 0. Needs real images."""

    weight_d: float = Field(default=1.0, gt=0)
    """Weight of the discriminator loss, which has updates of its own."""
    source: Literal["teacher", "pixels"] = "teacher"
    """Whose features the head reads: the frozen teacher's at noised samples (LADD), or those of a
    frozen pixel network on decoded ones (ADD)."""
    loss: AdversarialLoss = "hinge"
    """softplus (non-saturating), hinge, or clipped_hinge (the generator's stops at the margin)."""


@dataclass(frozen=True)
class Judge:
    """The heads' part of a method.

    own_times: noise levels that it judges at where the options state no law. sample: makes a sample
        for the second and later of several updates; the first takes that of the student's update.
    """

    gan: GANConfig
    path: NoisePath
    own_times: Times
    sample: Callable[[Nets, Batch, Ctx], Sample] | None = None

    @property
    def needs(self) -> frozenset[str]:
        """Batch fields the heads read."""
        return frozenset({"real"} if self.gan.enabled else ())

    def phases(self, student: Phase, repeat: int = 1) -> tuple[Phase, ...]:
        """The student's update and then, where there are heads, `repeat` of theirs by `loss`."""
        again = repeat > 1 and student.reads_x0
        disc = Phase("disc", self.loss, ("disc",), repeat, reads_x0=again)
        return (student, disc) if self.gan.enabled else (student,)

    def plus(self, losses: Losses, nets: Nets, ctx: Ctx, sample: Sample) -> Losses:
        """`losses`, and what the heads think of the student's sample, which they then learn."""
        if not self.gan.enabled:
            return losses
        ctx.carry["sample"] = sample.detach()

        def noised() -> tuple[Tensor, Tensor]:
            t = self.own_times(ctx, len(sample.x0))
            return self.path.add_noise(sample.x0, ctx.randn(tuple(sample.x0.shape)), t), t

        logits = sample_logits(nets, self.gan, ctx, self.path, sample, noised)
        judged = generator_loss(logits, self.gan.loss)
        return losses.plus(self.gan.weight_g, judged, gan_g=judged)

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The heads' loss on images and on the student's x0."""
        if ctx.repeat == 0 or self.sample is None:
            fake = cast(Sample, ctx.carry["sample"])
        else:
            with torch.no_grad():
                fake = self.sample(nets, batch, ctx)
        total, logs = judge_loss(nets, self.gan, ctx, self.path, batch, fake, self.own_times)
        logs = {name: value.detach() for name, value in logs.items()}
        return Losses(self.gan.weight_d * total, logs)


def judge_loss(
    nets: Nets, gan: GANConfig, ctx: Ctx, path: NoisePath, batch: Batch, fake: Sample, levels: Times
) -> tuple[Tensor, dict[str, Tensor]]:
    """The heads' loss (before weight_d) on the batch's images and on a sample, and its parts to
    log. Args: levels: see Judge.own_times."""

    def draw() -> Tensor:
        t = gan.law(path, ctx, batch.bsz)
        return levels(ctx, batch.bsz) if t is None else t

    sides = Sample(*batch.real), fake
    return disc_loss(nets, gan, ctx, path, *sides, draw, gan.same_times)


def sample_logits(
    nets: Nets,
    gan: GANConfig,
    ctx: Ctx,
    path: NoisePath,
    sample: Sample,
    noised: Callable[[], tuple[Tensor, Tensor]],
) -> Tensor:
    """(B, K) logits of a student's sample: as an image, noised by the options' law or else by
    `noised`: () -> (x_t, t)."""
    if gan.source == "pixels":
        return head_logits(nets, gan, *as_images(nets, ctx, sample))
    t = gan.law(path, ctx, len(sample.x0))
    if t is None:
        return head_logits(nets, gan, *noised(), sample.cond)
    x_t = path.add_noise(sample.x0, ctx.randn(tuple(sample.x0.shape)), t)
    return head_logits(nets, gan, x_t, t, sample.cond)
