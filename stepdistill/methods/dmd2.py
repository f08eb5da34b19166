"""DMD2: match the student's noised output distribution to the teacher's with two denoisers.

The score distillation of scores.py as it stands: reverse KL, a two time-scale rule (several updates
of the fake for one of the student) and an optional diffusion GAN, all options of ScoreConfig.
Source: Yin et al. 2024, arXiv:2405.14867, and its released code.
Differs from the paper: times follow the shifted law cut to the range (ports pile mass on its ends).
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import warnings

from pydantic import model_validator

from stepdistill.core.context import Ctx
from stepdistill.core.method import FakeFit, Nets
from stepdistill.core.recipe import Recipe
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.adversarial import generator_loss
from stepdistill.methods.digits import FEW, WARM, score
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores import ScoreDistillation
from stepdistill.methods.scores_config import ScoreConfig


class DMD2Config(ScoreConfig):
    """Options of dmd2."""

    gan_alone: bool = False
    """Train the student by the GAN alone, without distribution matching (an ablation of DMD2)."""

    @model_validator(mode="after")
    def _check_gan_alone(self) -> DMD2Config:
        if self.gan_alone and not self.gan.enabled:
            raise ValueError("gan_alone: expected gan.weight_g > 0, got 0. Set it, say to 1e-3.")
        if self.gan_alone and "guidance" in self.model_fields_set and self.guidance != 1.0:
            warnings.warn(
                f"guidance {self.guidance} has no effect with gan_alone: the student follows the "
                "images, not the teacher.",
                stacklevel=2,
            )
        return self


class DMD2(ScoreDistillation[DMD2Config]):
    """Distribution matching with a two time-scale rule and an optional diffusion GAN."""

    name = "dmd2"
    paper = "Yin et al. 2024, arXiv:2405.14867"
    Config = DMD2Config
    status = "trained on real data here"
    digits = (Recipe("dmd2", score(guidance=1.0), {2: FEW, 4: FEW}, first=WARM),)

    @property
    def teacher_guidance(self) -> float:
        return 1.0 if self.config.gan_alone else super().teacher_guidance

    @property
    def fake_fit(self) -> FakeFit | None:
        return None if self.config.gan_alone else super().fake_fit  # then its score moves no one

    def sample_loss(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Losses:
        if not self.config.gan_alone:
            return super().sample_loss(nets, batch, ctx, sample)
        logits, gan = self.student_logits(nets, batch, ctx, sample, None), self.config.gan
        gan_g = generator_loss(logits, gan.loss)
        return Losses(gan.weight_g * gan_g, {"gan_g": gan_g.detach()})
