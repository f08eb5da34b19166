"""Variational score distillation of a one-step student (SwiftBrush), from prompts alone.

The fake is a LoRA fitted to the student's samples. Teacher and fake are guided alike, so the fixed
point is the plain teacher, not a sharpened one; the gradient keeps VSD's weight,
    sigma^2 (eps_real - eps_fake) = alpha sigma (fake - real).
Sources: Wang et al. 2023, arXiv:2305.16213 (VSD); Nguyen & Tran 2024, arXiv:2312.05239
(SwiftBrush) and its code; Dao et al. 2024, arXiv:2408.14176 (SwiftBrush v2's clamped CLIP loss);
Nguyen et al. 2024, arXiv:2412.02687 (SNOOPI's random guidance).
Differs from the papers: on a flow path the same formulas with alpha = 1 - t, sigma = t; the null
prompt and the random guidance are drawn once for all processes.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

import warnings

from pydantic import Field, model_validator

from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets, ScorerSpec
from stepdistill.core.recipe import Recipe
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.losses.rewards import ClampedCLIPConfig, reward_loss
from stepdistill.losses.score import DenoisingSpace, DenoisingWeight, ScoreWeight
from stepdistill.methods.digits import WARM, score
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores import ScoreDistillation
from stepdistill.methods.scores_config import ScoreConfig


class VSDConfig(ScoreConfig):
    """Options of vsd, besides those of every score distillation."""

    guidance: float = Field(default=4.5, ge=0)
    """Guidance g of teacher and fake alike, null + g (cond - null); 1 means none."""
    guidance_range: tuple[float, float] | None = None
    """Draw g uniformly from this range at every update, the same for teacher, fake and all
    processes (SNOOPI); overrules guidance."""
    critic_steps: int = Field(default=1, ge=1)
    """Fake updates per student update."""
    weight: ScoreWeight = "sigma2"
    """Gradient weight: VSD's sigma2, DMD's per-sample L1 normaliser, or uniform."""
    fake_space: DenoisingSpace = "eps"
    """Space of the fake's denoising error; native is the network's own prediction type."""
    fake_weight: DenoisingWeight = "alpha2"
    """Weight of the fake's denoising error over noise levels: alpha^2 (SwiftBrush), none or edm."""
    null_probability: float = Field(default=0.1, ge=0, le=1)
    """How often the fake learns a whole batch under the null prompt; guiding it needs that."""

    clip: ClampedCLIPConfig = ClampedCLIPConfig()
    """Text alignment of the decoded samples (SwiftBrush v2); off by default."""

    @model_validator(mode="after")
    def _check_guidance(self) -> VSDConfig:
        if self.guidance_range is not None:
            low, high = self.guidance_range
            if not 0.0 <= low < high:
                raise ValueError(
                    f"guidance_range: expected 0 <= low < high, got {self.guidance_range}. "
                    "For a fixed value set guidance."
                )
            if self.changed("guidance"):
                warnings.warn(
                    f"guidance {self.guidance} has no effect: guidance_range overrules it.",
                    stacklevel=2,
                )
        return self


class VSD(ScoreDistillation[VSDConfig]):
    """Variational score distillation with both branches guided."""

    name = "vsd"
    paper = "Nguyen & Tran 2024, arXiv:2312.05239"
    Config = VSDConfig
    guidance_options = ("guidance_range", "guidance")
    status = "trained on real data here"
    aliases = {
        "swiftbrush": {},
        "swiftbrush_v2": {"clip": {"weight": 0.1}},
        "snoopi": {"guidance_range": (0.5, 4.0)},
    }
    trainer = "VariationalScoreTrainer"
    steps = (1,)
    digits = (
        # The null prompt serves a guided fake alone.
        Recipe("vsd", score(guidance=1.0, null_probability=0.0), first=WARM),
        Recipe("snoopi", score(guidance_range=[0.5, 1.5]), first=WARM),
    )

    @property
    def teacher_guidance(self) -> float:
        """1: guided alike, teacher and fake agree where the unguided student is the teacher."""
        return 1.0

    def guidances(self, g: float) -> tuple[float, float]:
        """Guidance of (teacher, fake): always the same, else it would shift the fixed point."""
        return g, g

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"prompts"} if self.config.clip.enabled else set())

    def scorers(self) -> dict[str, ScorerSpec]:
        clip = {"clip": self.config.clip.spec} if self.config.clip.enabled else {}
        return {**super().scorers(), **clip}

    def sample_loss(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Losses:
        """VSD's loss and, while its weight lasts, that of samples CLIP finds off the prompt."""
        losses, clip = super().sample_loss(nets, batch, ctx, sample), self.config.clip
        weight = clip.weight_at(ctx.step, ctx.max_steps)
        if weight == 0.0:
            return losses
        assert batch.prompts is not None, "the trainer checks `needs`"
        score = nets.scorer("clip")(nets.images(sample.x0), batch.prompts)
        loss = reward_loss(score, clip.tau)
        return losses.plus(weight, loss, clip=loss, clip_score=score.detach().mean())

    def fake_cond(self, cond: Cond, null: Cond, ctx: Ctx) -> Cond:
        """The sample's condition, or now and then the null prompt for the whole batch."""
        return null if ctx.shared_rand() < self.config.null_probability else cond
