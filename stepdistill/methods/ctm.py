"""Consistency trajectory models (CTM): jumps from any t to any s <= t, compared at clean data.

With x_u some h solver steps from x_t, s <= u, and G the jump of any_end.py:
    loss = d( G_target(G_student(x_t, t, s), s, 0), stopgrad G_target(G_target(x_u, u, s), s, 0) ),
whose gradient reaches the student through the frozen target's input: "soft" consistency, local at
h = 1, global at u = s. Beside it, as options: denoising of G(x, t, t) (DSM), and a critic of the
estimate against images (GAN).
Source: Kim et al. 2023, arXiv:2310.02279, Eq. 8-11, and its released code.
Differs from the paper: the terms' weights are numbers, not ratios of gradients; the head reads
noised samples by the teacher's features; gamma is TCD's, a fraction of time.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t, u, s: (B,).

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets, Role, ScorerSpec
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec, teacher_step
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.adversarial import generator_loss
from stepdistill.losses.score import denoising_loss, denoising_weight
from stepdistill.methods.any_end import AnyEnd, Staying
from stepdistill.methods.ctm_config import CTMConfig
from stepdistill.methods.digits import jumps
from stepdistill.methods.gan import disc_loss, head_logits
from stepdistill.methods.grid import drawn_times, heun_step
from stepdistill.methods.perceptual import pair_distance
from stepdistill.methods.rollout import Sample


class CTM(AnyEnd[CTMConfig]):
    """Soft consistency of jumps to any end, with denoising and adversarial terms."""

    name = "ctm"
    paper = "Kim et al. 2023, arXiv:2310.02279"
    Config = CTMConfig
    status = "trained on real data here"
    aliases = {"consistency_trajectory": {}}
    trainer = "TrajectorySegmentedTrainer"
    data = "images"
    one_student = True
    digits = (Recipe("ctm", jumps(1000, loss="l2", ema_decay=0.95, solver_steps=4)),)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | ({"real"} if self.config.gan.enabled else set())

    def num_segments(self, step: int, max_steps: int) -> int:
        return 1

    def roles(self) -> dict[str, Role]:
        roles = super().roles()
        if self.config.bootstrap and not self.config.gan.enabled:
            del roles["teacher"]
        return roles

    def scorers(self) -> dict[str, ScorerSpec]:
        return {} if self.config.lpips is None else {"lpips": self.config.lpips.spec}

    def solve(
        self, nets: Nets, batch: Batch, x_t: Tensor, top: Tensor, h: int, g: float | Tensor
    ) -> Tensor:
        """x_u (B, C, *S), h grid intervals below point `top` (B,), by the teacher's solver."""
        config, t = self.config, self.segments.time(top)
        step = heun_step if config.solver == "heun" else teacher_step
        net = Staying(nets["target"]) if config.bootstrap else nets["teacher"]
        for i in range(1, h + 1):
            s = self.segments.time(top - i)
            x_t, t = step(net, x_t, t, s, batch.cond, batch.null, g), s
        return x_t

    def estimate(
        self, nets: Nets, batch: Batch, ctx: Ctx, solved: bool = True
    ) -> tuple[Tensor, Tensor]:
        """(estimate, target), both (B, C, *S) clean; solved: whether the target is wanted, else it
        is the estimate."""
        config, cond, time = self.config, batch.cond, self.segments.time
        h = config.intervals(ctx.shared_rand())
        stop = ctx.randint(0, config.num_grid - h + 1, batch.bsz)
        g, t = ctx.between(config.guidance_range, batch.bsz), time(stop + h)
        x_t = self.noised(batch, t, ctx)
        s = time(self.draw_end(ctx, stop, 1))

        def clean(x_s: Tensor) -> Tensor:
            return self.reach(nets, "target", x_s, s, torch.zeros_like(s), cond)

        estimate = clean(self.reach(nets, "student", x_t, t, s, cond))
        if not solved:
            return estimate, estimate
        with torch.no_grad():
            x_u = self.solve(nets, batch, x_t, stop + h, h, g)
            target = clean(self.reach(nets, "target", x_u, time(stop), s, cond))
        return estimate, target

    def draw_noisier(self, ctx: Ctx, bsz: int, like: Tensor) -> Tensor:
        """(B,) times of the whole grid at which the head compares."""
        clean = torch.zeros(bsz, dtype=torch.int64, device=like.device)
        return self.segments.draw_noisier(ctx.rand(bsz), clean, clean, 1)

    def student_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """Soft consistency and, where they have a weight, the GAN's and the denoising term."""
        config, path, batch = self.config, self.setting.path, self._with_prompt_dropout(batch, ctx)
        estimate, target = self.estimate(nets, batch, ctx)
        kind = config.loss if config.lpips is None else "lpips"
        loss = pair_distance(nets, kind, estimate, target, config.huber_c).mean()
        losses = Losses(loss, {"loss": loss.detach()})
        if config.gan.enabled:
            t = self.draw_noisier(ctx, batch.bsz, estimate)
            x_t = path.add_noise(estimate, ctx.randn(tuple(estimate.shape)), t)
            logits = head_logits(nets, config.gan, x_t, t, batch.cond)
            gan = generator_loss(logits, config.gan.loss)
            losses = losses.plus(config.gan.weight_g, gan, gan_g=gan)
        if config.denoising:
            error = self.denoising(nets, batch, ctx)
            losses = losses.plus(config.denoising, error, denoising=error)
        return losses

    def denoising(self, nets: Nets, batch: Batch, ctx: Ctx) -> Tensor:
        """Denoising error of G(x, t, t) as networks of its kind are trained; EDM's weight of x0."""
        config, path, x0 = self.config, self.setting.path, batch.x0
        assert x0 is not None, "the trainer checks `needs`"
        noise, u = ctx.randn(tuple(x0.shape)), ctx.stratified(batch.bsz)
        t = drawn_times(path, u, config.denoising_mean, config.denoising_std)
        pred = nets["student"](path.add_noise(x0, noise, t), t, batch.cond, s=self.end_input(t))
        weight = denoising_weight("edm" if pred.kind == "x0" else "none", path.coeffs(t))
        return denoising_loss(pred, x0, noise, weight=weight)

    def disc_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The head's loss on images and on estimates without graph, each noised by itself."""
        batch, gan, path = self._with_prompt_dropout(batch, ctx), self.config.gan, self.setting.path
        with torch.no_grad():
            fake, _ = self.estimate(nets, batch, ctx, solved=False)

        def draw() -> Tensor:
            return self.draw_noisier(ctx, batch.bsz, fake)

        sides = Sample(*batch.real), Sample(fake, batch.cond)
        total, logs = disc_loss(nets, gan, ctx, path, *sides, draw)
        return Losses(gan.weight_d * total, {name: value.detach() for name, value in logs.items()})

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """Grid times of any number of steps."""
        return self.spec(1, num_steps)
