"""f-distill: DMD2 for any f-divergence, one weight h(r) per sample on the same gradient.

r = teacher density / student density at the noised sample, read off the GAN's head. Mode-seeking
(rkl, sf) to mode-covering (kl, jf) is a choice of h; rkl is dmd2's gradient, bit for bit.
Source: Xu et al. 2025, arXiv:2502.15681.
Differs from the paper: no 1e-6 in denominators (ratio_clip keeps means positive), so weights of
equal ratios are exactly 1.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K heads, N time bins. t: (B,).

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Prediction
from stepdistill.core.method import Nets, Setting
from stepdistill.core.recipe import Recipe
from stepdistill.core.types import Batch
from stepdistill.losses.divergence import (
    Divergence,
    bin_stats,
    density_ratio,
    divergence_weight,
    time_bin,
    update_bins,
)
from stepdistill.methods.digits import FEW, WARM, score
from stepdistill.methods.gan import GANConfig, head_logits
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores import ScoreDistillation, Scores
from stepdistill.methods.scores_config import ScoreConfig


class FDistillConfig(ScoreConfig):
    """Options of f_distill. Needs real images and a trained head."""

    gan: GANConfig = GANConfig(weight_g=1e-3)
    """Adversarial term, always on (weight_g > 0, weight_d > 0, softplus): its head is the ratio."""
    divergence: Divergence = "js"
    """rkl (DMD), kl, js, sf (softened reverse KL), sh (squared Hellinger), neyman or jf."""
    ratio_clip: tuple[float, float] = (0.1, 20.0)
    """Bounds of the density ratio before normalisation."""
    ratio_bins: int = Field(default=10, ge=1)
    """Equal time bins over the gradient's times; ratios are divided by their bin's mean."""
    ratio_ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of the bins' moving means; 0 takes each batch's own, which needs large batches."""

    @model_validator(mode="after")
    def _check_ratio(self) -> FDistillConfig:
        gan, (low, high) = self.gan, self.ratio_clip
        if not gan.enabled or gan.weight_d == 0.0 or gan.loss != "softplus":
            raise ValueError(
                "gan: expected weight_g > 0, weight_d > 0 and loss softplus (the head's logit is "
                f"the log density ratio), got {gan.weight_g}, {gan.weight_d} and {gan.loss}. "
                "Set gan.weight_g, say 1e-3, or use method dmd2."
            )
        if gan.source == "pixels" or gan.mismatched:
            raise ValueError(
                "gan: expected a head that sees noised samples of data and student alone (its "
                f"logit is the ratio), got source {gan.source}, mismatched {gan.mismatched}. Set "
                "gan.source: fake or teacher, gan.mismatched: false."
            )
        if not 0.0 < low < high:
            raise ValueError(f"ratio_clip: expected 0 < low < high, got {self.ratio_clip}.")
        return self


class FDistill(ScoreDistillation[FDistillConfig]):
    """DMD2 with the per-sample weight of an f-divergence."""

    name = "f_distill"
    paper = "Xu et al. 2025, arXiv:2502.15681"
    Config = FDistillConfig
    serves_part = True
    status = "trained on real data here"
    data = "images"  # of the ratio's head
    digits = (Recipe("f_distill", score(guidance=1.0), {2: FEW, 4: FEW}, first=WARM),)

    def __init__(self, config: FDistillConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        self.low, self.high = config.draw_times(setting, ends, config.dm_t_range).tolist()
        self.bins = torch.ones(config.ratio_bins)  # (N,) mean ratio of each time bin

    def fake_score(self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, g: float) -> Prediction:
        """One call for the score and, where the head reads the fake, for its features."""
        if self.config.gan.source != "fake":
            return super().fake_score(nets, batch, x_t, t, g)
        return nets["fake"](x_t, t, batch.cond, features=self.config.gan.blocks)

    def student_logits(
        self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample, scores: Scores | None
    ) -> Tensor:
        """(B, K) logits at the gradient's own (x_t, t): h is a function of that very x_t."""
        assert scores is not None, "its gradient is always wanted"
        if scores.fake.features:
            return nets.head("disc", scores.fake.features)
        return head_logits(nets, self.config.gan, scores.fake.x_t, scores.fake.t, batch.cond)

    def sample_weights(self, ctx: Ctx, t: Tensor, logits: Tensor) -> Tensor:
        """(B,) h(r) over its mean, both over the global batch."""
        config = self.config
        alone = len(t) * ctx.world_size == 1 and config.ratio_ema == 0.0
        if alone and config.divergence != "rkl":
            warnings.warn(
                "f_distill: with one sample a batch and ratio_ema 0 the normalised ratio is 1, so "
                f"divergence {config.divergence!r} has no effect. Use larger batches or ratio_ema.",
                stacklevel=2,
            )
        ratio = density_ratio(logits, config.ratio_clip)
        index = time_bin(t, self.low, self.high, config.ratio_bins)
        stats = ctx.mean_over_ranks(bin_stats(ratio, index, config.ratio_bins))
        self.bins = update_bins(self.bins.to(ratio.device), stats, config.ratio_ema)
        h = divergence_weight(ratio / self.bins[index], config.divergence)
        return h / ctx.mean_over_ranks(h.mean())

    def state_dict(self) -> dict[str, Tensor]:
        return {"ratio_bins": self.bins}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        saved = state.get("ratio_bins")
        if saved is None or saved.shape != self.bins.shape:
            raise ValueError(
                f"f_distill: expected saved ratio_bins of {self.config.ratio_bins} bins, got "
                f"{sorted(state) if saved is None else len(saved)}. Resume with the run's settings."
            )
        self.bins = saved.clone()
