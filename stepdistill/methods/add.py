"""ADD: adversarial diffusion distillation, heads on a frozen pixel network beside the teacher's own
denoising of the student's samples.

    loss = weight_g * adversarial + distillation * c(t) |x0 - sg(x0_teacher(x_t, t))|^2,
x_t the student's x0 noised anew. The first term, on decoded x0, makes it sharp and real; the second
is score distillation and keeps it to the prompt: its gradient is that of SDS with c = alpha sigma,
and with c = alpha (the paper's choice, exponential) noisy levels count for less.
Source: Sauer et al. 2023, arXiv:2311.17042. No training code was released.
Differs from the paper: heads see neither the prompt nor an image embedding; distances are of
latents; heads are those of roles/heads.py.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets
from stepdistill.core.recipe import Recipe
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.regression import squared_error, weighted_mean
from stepdistill.methods.digits import heads
from stepdistill.methods.judge import JudgeGAN
from stepdistill.methods.ladd import LADD, LADDConfig
from stepdistill.methods.rollout import Sample


class ADDGAN(JudgeGAN):
    """Always on. Needs real images."""

    weight_g: float = Field(default=1.0, gt=0)
    """Weight of the generator loss."""
    source: Literal["teacher", "pixels"] = "pixels"
    """Whose features the head reads: those of a frozen pixel network on decoded samples, or the
    frozen teacher's at noised ones (LADD)."""
    r1_weight: float = Field(default=1e-5, ge=0)
    """Weight of R1 on real samples, inside weight_d."""
    r1: Literal["approximate", "exact", "features"] = "features"
    """R1 by the second derivative through the heads alone, through their network too (exact), or by
    a perturbed input (approximate)."""


class ADDConfig(LADDConfig):
    """Options of add, besides those of ladd."""

    distillation: float = Field(default=2.5, gt=0)
    """Weight of the distillation term."""
    distillation_weight: Literal["alpha", "sds"] = "alpha"
    """Its weight c over noise levels: alpha (exponential), or alpha sigma (that of SDS)."""
    guidance: float = Field(default=3.0, ge=0)
    """Guidance g of the teacher in that term, null + g (cond - null); 1 means none."""
    gan: ADDGAN = ADDGAN()  # type: ignore[assignment]
    """The heads."""


class ADD(LADD[ADDConfig]):
    """A student moved by heads on a pixel network and by the teacher's denoising."""

    name = "add"
    paper = "Sauer et al. 2023, arXiv:2311.17042"
    Config = ADDConfig
    guidance_options = ("guidance",)
    status = "trained on real data here"
    aliases = {"adversarial_diffusion_distillation": {}}
    trainer = "AdversarialTrainer"
    data = "images"
    digits = (
        Recipe(
            "add",
            heads(guidance=1.0, distillation=0.5, gan={"blocks": ["block.2", "block.4"]}),
        ),
    )

    def others(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Losses:
        """The weighted distance of x0 to what the teacher makes of it, noised; logged plain."""
        config, path, t = self.config, self.setting.path, self.noise_times(ctx, batch.bsz)
        with torch.no_grad():
            x_t = path.add_noise(sample.x0, ctx.randn(tuple(sample.x0.shape)), t)
            target = nets["teacher"](x_t, t, batch.cond, batch.null, config.guidance).x0
        alpha, sigma = path.coeffs(t)
        weight = alpha if config.distillation_weight == "alpha" else alpha * sigma
        error = weighted_mean(squared_error(sample.x0, target), weight)
        return Losses(config.distillation * error, {"distillation": error.detach()})
