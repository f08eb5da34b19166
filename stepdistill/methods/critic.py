"""The fake half of score distillation: a denoiser, and a head, fitted to the student's own samples.

Base of `scores.ScoreDistillation`, whose docstring lists what may be overridden; alone it serves a
method that wants the student's score for another loss.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

import warnings
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets, Phase, Role, ScorerSpec, Setting
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.losses.score import denoising_loss, denoising_weight
from stepdistill.methods.judge import judge_loss
from stepdistill.methods.rollout import START, Rollout, Sample, TimeRange, Within
from stepdistill.methods.scores_config import ScoreConfig
from stepdistill.methods.warm_start import WarmStarted

S = TypeVar("S", bound=ScoreConfig)


class CriticMethod(WarmStarted[S], Generic[S]):
    """A few-step student by the rollout, and the fake that knows its distribution."""

    def __init__(self, config: S, setting: Setting) -> None:
        super().__init__(config, setting)
        config.check_fake_weight(setting)
        if config.skip_layers and self.guidance_of(config) == (1.0, 1.0):
            warnings.warn(
                f"skip_layers {config.skip_layers} has no effect: guidance 1 has no null pass.",
                stacklevel=2,
            )
        starts_late = setting.owned[1] < 1.0
        times = config.trained_times(setting)
        self.rollout = Rollout(config, setting.path, times, from_start=starts_late)

    @property
    def needs(self) -> frozenset[str]:
        x0 = {"x0"} if self.config.rollout == "data" else set()
        start = {START} if self.rollout.from_start else set()
        return frozenset({"cond", *x0, *start, *({"real"} if self.config.gan.enabled else ())})

    def roles(self) -> dict[str, Role]:
        trained = {"student": Role(train=True), "fake": Role(train=True)}
        return {"teacher": Role(), **trained, **self.config.gan.roles()}

    def scorers(self) -> dict[str, ScorerSpec]:
        return self.config.gan.scorers()

    def critic_phase(self) -> Phase:
        """critic_steps updates of the fake and, where there is one, the head."""
        trained = ("fake", *self.config.gan.roles())
        reads = (self.config.rollout == "data", "real" in self.needs)
        return Phase("fake", self.fake_loss, trained, self.config.critic_steps, *reads)

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        return self.config.spec(self.setting, num_steps)

    def sample(self, nets: Nets, batch: Batch, ctx: Ctx) -> Sample:
        """What the student makes; only its last call carries gradients."""
        return self.rollout.sample(nets, batch, ctx)

    def draw_times(
        self, ctx: Ctx, bsz: int, t_range: TimeRange, within: Within | None = None
    ) -> Tensor:
        """(B,) noise levels in that range, and within those times."""
        return self.config.draw_times(self.setting, self.draw_levels(ctx, bsz), t_range, within)

    def draw_levels(self, ctx: Ctx, bsz: int) -> Tensor:
        """(B,) float64 in [0, 1], where in a range its noise levels lie."""
        return ctx.stratified(bsz)

    def noised(
        self, ctx: Ctx, sample: Sample, t_range: TimeRange, within: Within | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t (B, C, *S), t (B,), noise (B, C, *S)) of a sample at a noise level of draw_times."""
        t = self.draw_times(ctx, len(sample.x0), t_range, within)
        noise = ctx.randn(tuple(sample.x0.shape))
        return self.setting.path.add_noise(sample.x0, noise, t), t, noise

    def fake_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """`denoising` of a student sample and, where there is a head, its own loss."""
        config, sample = self.config, self.critic_sample(nets, batch, ctx)
        gan = config.gan
        error = self.denoising(nets, batch, ctx, sample)
        losses = Losses(error, {"fake": error.detach()})
        if not gan.enabled:
            return losses

        def levels(ctx: Ctx, bsz: int) -> Tensor:
            return self.draw_times(ctx, bsz, config.fake_t_range)

        disc, logs = judge_loss(nets, gan, ctx, self.setting.path, batch, sample, levels)
        return losses.plus(gan.weight_d, disc, **logs)

    def critic_sample(self, nets: Nets, batch: Batch, ctx: Ctx) -> Sample:
        """A sample without graph: the student update's own if `order` says so and it made one."""
        if self.config.order == "critic_always" and ctx.repeat == 0 and "sample" in ctx.carry:
            return cast(Sample, ctx.carry["sample"])
        with torch.no_grad():
            return self.sample(nets, batch, ctx)

    def denoising(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Tensor:
        """The fake's weighted denoising error on a sample."""
        config, (x_t, t, noise) = self.config, self.noised(ctx, sample, self.config.fake_t_range)
        cond = self.fake_cond(sample.cond, batch.null, ctx)
        pred = nets["fake"](x_t, t, cond, batch.null, self.fitted_guidance)
        weight = denoising_weight(config.fake_weight, pred.path.coeffs(pred.t))
        x0, eps, share = self.fitted_pair(sample, x_t, t, noise)
        weight = weight if share is None else share if weight is None else weight * share
        return denoising_loss(pred, x0, eps, config.fake_space, weight)

    def fitted_pair(
        self, sample: Sample, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(x0, eps, (B,) weight or None for 1) that the fake's error at x_t is taken against."""
        return sample.x0, noise, None

    def fake_cond(self, cond: Cond, null: Cond, ctx: Ctx) -> Cond:
        """The condition the fake is fitted under; a method that guides it drops some to `null`."""
        return cond

    @property
    def fitted_guidance(self) -> float:
        """Guidance of the fake's prediction that is fitted: none in all but SiD-LSG."""
        return 1.0
