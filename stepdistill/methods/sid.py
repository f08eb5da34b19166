"""SiD: score identity distillation, a Fisher-like divergence differentiated through both denoisers.

With y_r, y_f the teacher's and the fake's x0 of the noised sample x_t, and w = mean|x - y_r|:
    L = sum (y_r - y_f) ((y_r - x) - alpha (y_r - y_f)) / w,    w without gradient.
The gradient reaches x directly and through x_t of both networks, whose weights stay as they are:
without that graph it would be DMD's, whatever alpha is. The fake learns first, then the student.
Guidance of the fake: none (the teacher alone is guided), long_short (SiD-LSG: the fake is fitted
and read under the teacher's own guidance), zero_cfg (fitted and read under the null prompt).
Sources: Zhou et al. 2024, arXiv:2404.04057; SiD-LSG, arXiv:2406.01561; few steps and Zero-CFG,
arXiv:2505.12674; their released code.
Differs from the papers: means over a sample, not sums; a step starts at pure noise of unit size,
as in sampling; several steps are matched at a random one of the student's own rollout, not
differentiated through all.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Prediction
from stepdistill.core.method import Nets, Phase
from stepdistill.core.recipe import Recipe
from stepdistill.core.types import Batch, Cond
from stepdistill.losses.score import score_identity
from stepdistill.methods.digits import FEW, WARM, score
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores import ScoreDistillation, Scores
from stepdistill.methods.scores_config import ScoreConfig


class SiDConfig(ScoreConfig):
    """Options of sid, besides those of every score distillation."""

    alpha: float = Field(default=1.0, gt=0)
    """Weight of the squared difference. Above 1 the samples' variance runs away once the noised
    student's is more than alpha / (alpha - 1) times the teacher's: 6 times at 1.2 (SiD's)."""
    fake_guidance: Literal["none", "long_short", "zero_cfg"] = "none"
    """none: the fake as it is; long_short: fitted and read under `guidance`, as the teacher is
    (SiD-LSG); zero_cfg: fitted and read under the null prompt, beside a plain teacher."""
    null_probability: float = Field(default=0.1, ge=0, lt=1)
    """Share of samples whose prompt the fake loses while it learns; read by long_short alone."""
    critic_steps: int = Field(default=1, ge=1)
    """Fake updates per student update, before it."""

    @model_validator(mode="after")
    def _check_fake_guidance(self) -> SiDConfig:
        if self.fake_guidance == "zero_cfg" and self.guidance != 1.0:
            raise ValueError(
                f"fake_guidance: expected guidance 1 beside zero_cfg, got {self.guidance:g}: the "
                "null prompt of the fake stands in for it. Set guidance: 1."
            )
        if self.changed("weight"):
            warnings.warn(
                f"weight {self.weight!r} has no effect: sid has its own normaliser.", stacklevel=2
            )
        return self


class SiD(ScoreDistillation[SiDConfig]):
    """Score identity distillation, its guidance variants, one step and few."""

    name = "sid"
    paper = "Zhou et al. 2024, arXiv:2404.04057"
    Config = SiDConfig
    serves_part = True
    status = "trained on real data here"
    aliases = {
        "score_identity": {},
        "sid_lsg": {"fake_guidance": "long_short"},
    }
    through_scores = True
    digits = (Recipe("sid", score(guidance=1.0), {2: FEW, 4: FEW}, first=WARM),)

    @property
    def reads_null(self) -> str:
        return "fake_guidance zero_cfg" if self.config.fake_guidance == "zero_cfg" else ""

    def phases(self, step: int) -> Sequence[Phase]:
        """The fake first: it would lag by an update behind the student."""
        student, fake = super().phases(step)
        return fake, student

    def guidances(self, g: float) -> tuple[float, float]:
        """Guidance of (teacher, fake)."""
        return g, g if self.config.fake_guidance == "long_short" else 1.0

    @property
    def fitted_guidance(self) -> float:
        """What long_short guides in the losses it also fits: else the fixed point would shift."""
        return self.guidances(0.5 * sum(self.guidance_of(self.config)))[1]

    def fake_cond(self, cond: Cond, null: Cond, ctx: Ctx) -> Cond:
        """The null prompt alone (zero_cfg), or of a share of the samples (long_short)."""
        config = self.config
        if config.fake_guidance == "zero_cfg":
            return null
        if config.fake_guidance == "none" or config.null_probability == 0.0:
            return cond
        return cond.where_not(ctx.host_rand(cond.bsz) < config.null_probability, null)

    def fake_score(self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, g: float) -> Prediction:
        """Of the null prompt with zero_cfg."""
        seen = replace(batch, cond=batch.null) if self.reads_null else batch
        return super().fake_score(nets, seen, x_t, t, g)

    def matching(self, sample: Sample, scores: Scores, weights: Tensor | None = None) -> Tensor:
        """The mean loss; negative values are in order for alpha above 1."""
        loss = score_identity(sample.x0, scores.real.x0, scores.fake.x0, self.config.alpha)
        return (loss if weights is None else weights * loss).mean()
