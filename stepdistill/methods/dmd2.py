"""DMD2: match the student's noised output distribution to the teacher's with two denoisers.

The frozen teacher ("real") and a "fake" denoiser fitted to the student's samples see the same
noised sample; the difference of their denoised means is the student's gradient (reverse KL).
Source: Yin et al. 2024, arXiv:2405.14867, and its released code.
Differs from the paper: times follow the shifted law cut to the range (ports pile mass on its ends).
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K heads. t: (B,).

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Prediction
from stepdistill.core.method import FIELDS, Method, Nets, Phase, Role, Setting
from stepdistill.core.path import expand
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.losses.adversarial import generator_loss
from stepdistill.losses.score import denoising_loss, dmd_gradient, surrogate
from stepdistill.methods.digits import FEW, WARM, score
from stepdistill.methods.dmd2_config import DMD2Config
from stepdistill.methods.gan import Sample, disc_loss, head_logits
from stepdistill.methods.rollout import Rollout, warn_x0_gain


class DMD2(Method[DMD2Config]):
    """Distribution matching with a two time-scale rule and an optional diffusion GAN."""

    name = "dmd2"
    paper = "Yin et al. 2024, arXiv:2405.14867"
    Config = DMD2Config
    status = "trained on real data here"
    trainer = "DistributionMatchingTrainer"
    digits = (Recipe("dmd2", score(guidance=1.0), {2: FEW, 4: FEW}, first=WARM),)

    def __init__(self, config: DMD2Config, setting: Setting) -> None:
        super().__init__(config, setting)
        self.rollout = Rollout(config, setting.path, config.trained_times(setting))
        warn_x0_gain(self.name, setting, self.rollout.times[0])

    @property
    def needs(self) -> frozenset[str]:
        images = self.config.gan.enabled or self.config.rollout == "data"
        return FIELDS["images" if images else "prompts"]

    def roles(self) -> dict[str, Role]:
        trained = {"student": Role(train=True), "fake": Role(train=True)}
        return {"teacher": Role(), **trained, **self.config.gan.roles()}

    def phases(self, step: int) -> Sequence[Phase]:
        """One student update, then critic_steps updates of the fake (and head)."""
        critics = ("fake", *self.config.gan.roles())
        for_head = self.config.gan.enabled and self.config.rollout != "data"  # images, if any
        return (
            Phase("student", self._student_loss, ("student",), reads_x0=not for_head),
            Phase("fake", self._fake_loss, critics, self.config.critic_steps),
        )

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        return self.config.spec(self.setting, num_steps)

    def _student_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        x0 = self.rollout(nets, batch, ctx)
        ctx.carry["sample"] = (x0.detach(), batch.cond)
        return self._sample_loss(nets, batch, ctx, x0)

    def _sample_loss(self, nets: Nets, batch: Batch, ctx: Ctx, x0: Tensor) -> Losses:
        """What the student's sample x0 (B, C, *S) costs."""
        config, path = self.config, self.setting.path
        t = self._draw_times(ctx, batch.bsz, config.dm_t_range)
        x_t = path.add_noise(x0, ctx.randn(tuple(x0.shape)), t)
        g_real, g_fake = self._guidances(ctx)
        fake = self._fake_prediction(nets, batch, x_t, t, g_fake)
        with torch.no_grad():
            real = nets["teacher"](x_t, t, batch.cond, batch.null, g_real)
            grad = dmd_gradient(x0, real.x0, fake.x0, config.weight, path.coeffs(t))
        if not config.gan.enabled:
            dm = surrogate(x0, grad)
            return Losses(dm, {"dm": dm.detach()})
        logits = self._student_logits(nets, batch, ctx, x0, fake)
        weights = self._sample_weights(ctx, t, logits.detach())
        dm = surrogate(x0, grad if weights is None else expand(weights, grad) * grad)
        gan_g = generator_loss(logits, config.gan.loss)
        logs = {"dm": dm.detach(), "gan_g": gan_g.detach()}
        return Losses(dm + config.gan.weight_g * gan_g, logs)

    def _fake_prediction(
        self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, guidance: float
    ) -> Prediction:
        """The fake's prediction at the gradient's own (x_t, t)."""
        with torch.no_grad():
            return nets["fake"](x_t, t, batch.cond, batch.null, guidance)

    def _guidances(self, ctx: Ctx) -> tuple[float, float]:
        """Guidance of (teacher, fake) in the student's gradient."""
        return self.config.guidance, 1.0

    def _student_logits(
        self, nets: Nets, batch: Batch, ctx: Ctx, x0: Tensor, fake: Prediction
    ) -> Tensor:
        """(B, K) logits of the student's samples, at a noise level of their own as in DMD2."""
        t = self._draw_times(ctx, batch.bsz, self.config.fake_t_range)
        x_t = self.setting.path.add_noise(x0, ctx.randn(tuple(x0.shape)), t)
        return head_logits(nets, self.config.gan, x_t, t, batch.cond)

    def _sample_weights(self, ctx: Ctx, t: Tensor, logits: Tensor) -> Tensor | None:
        """(B,) factors on the gradient, or None for reverse KL's 1."""
        return None

    def _fake_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        config, path = self.config, self.setting.path
        x0, cond = self._fake_sample(nets, batch, ctx)
        t = self._draw_times(ctx, batch.bsz, config.fake_t_range)
        noise = ctx.randn(tuple(x0.shape))
        pred = nets["fake"](path.add_noise(x0, noise, t), t, self._fake_cond(cond, batch.null, ctx))
        total = self._denoising(pred, x0, noise)
        logs = {"fake": total}
        if config.gan.enabled:
            assert batch.x0 is not None, "the GAN needs x0"
            draw = partial(self._draw_times, ctx, batch.bsz, config.fake_t_range)
            real, fake = (batch.x0, batch.cond), (x0, cond)
            disc, disc_logs = disc_loss(nets, config.gan, ctx, path, real, fake, draw)
            total, logs = total + config.gan.weight_d * disc, {**logs, **disc_logs}
        return Losses(total, {name: value.detach() for name, value in logs.items()})

    def _fake_sample(self, nets: Nets, batch: Batch, ctx: Ctx) -> Sample:
        """A student sample without graph, and the condition it was made for."""
        if self.config.order == "critic_always" and ctx.repeat == 0:
            return cast(Sample, ctx.carry["sample"])
        with torch.no_grad():
            return self.rollout(nets, batch, ctx), batch.cond

    def _fake_cond(self, cond: Cond, null: Cond, ctx: Ctx) -> Cond:
        """The condition the fake is trained under; VSD drops some to `null`."""
        return cond

    def _denoising(self, pred: Prediction, x0: Tensor, noise: Tensor) -> Tensor:
        return denoising_loss(pred, x0, noise, self.config.fake_space)

    def _draw_times(self, ctx: Ctx, bsz: int, t_range: tuple[float, float]) -> Tensor:
        return self.config.draw_times(self.setting, ctx.stratified(bsz), t_range)
