"""What trajectory-segmented methods share: two jumps to one end of a segment, and a critic of them.

With x_s one guided teacher step from x_t along a grid and e an end inside t's segment:
    loss = d( J_student(x_t, t -> e), stopgrad J_target(x_s, s -> e) ) + weight_g * adversarial,
J the deterministic (DDIM, on flow Euler) step by the network's own x0. The critic compares the two
jumps, both carried to a noisier time by the forward kernel; real is the target's, not data. At
t = 1 the student sees pure noise, as in sampling; the released codes leave a table's trace of x0.
Sources: Ren et al. 2024 (Hyper-SD), arXiv:2404.13686; Wang et al. 2024 (PCM), arXiv:2405.18407.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K grid intervals. t, s: (B,).

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Method, Nets, Phase, Role, Setting
from stepdistill.core.solvers import teacher_step
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.losses.adversarial import generator_loss
from stepdistill.losses.regression import distance, weighted_mean
from stepdistill.methods.gan import Noised, head_logits, noised_disc_loss
from stepdistill.methods.grid import SolverGrid
from stepdistill.methods.segments import Jumps, Segments, jump
from stepdistill.methods.trajectory_config import TrajectoryConfig

T = TypeVar("T", bound=TrajectoryConfig)


class TrajectoryMethod(Method[T]):
    """Base of tscd, pcm, ctm: they say how many segments there are, and where a jump ends."""

    guidance_options = ("guidance_range",)

    def __init__(self, config: T, setting: Setting) -> None:
        super().__init__(config, setting)
        self.grid = SolverGrid(setting, config.num_grid, "none")
        self.segments = Segments(self.grid)

    @property
    def teacher_guidance(self) -> float:
        return super().teacher_guidance * self.config.inference_guidance  # one of the two is 1

    @abstractmethod
    def num_segments(self, step: int, max_steps: int) -> int:
        """k at student step `step`; a pure function of the position."""

    @abstractmethod
    def draw_end(self, ctx: Ctx, index: Tensor, k: int) -> Tensor:
        """(B,) grid points that jumps from interval `index` (B,) end at."""

    def weights(self, ctx: Ctx) -> tuple[float, float]:
        """Weights of the distance and of the adversarial term now."""
        return 1.0, self.config.gan.weight_g

    def _with_prompt_dropout(self, batch: Batch, ctx: Ctx) -> Batch:
        """The batch after prompt dropout."""
        share = self.config.null_probability
        return batch.nulled(ctx.host_rand(batch.bsz) < share) if share > 0.0 else batch

    def roles(self) -> dict[str, Role]:
        roles = {"teacher": Role(), "student": Role(train=True)}
        if self.config.target == "ema":
            roles["target"] = Role(ema_of="student")
        return {**roles, **self.config.gan.roles()}

    def phases(self, step: int) -> Sequence[Phase]:
        """An update of the head on its own batch, where there is one, then the student's."""
        disc = (Phase("disc", self.disc_loss, ("disc",)),) if self.config.gan.enabled else ()
        return (*disc, Phase("student", self.student_loss, ("student",), reads_real=False))

    def after(self, nets: Nets, step: int) -> None:
        if self.config.target == "ema":
            nets.ema_update("target", self.config.ema_decay)

    def noised(self, batch: Batch, t: Tensor, ctx: Ctx) -> Tensor:
        """x_t (B, C, *S) of the images under fresh noise, offset where the config says so."""
        x0, offset = batch.x0, self.config.noise_offset
        assert x0 is not None, "the trainer checks `needs`"
        noise = ctx.randn(tuple(x0.shape))
        if offset > 0.0:
            noise = noise + offset * ctx.randn((*x0.shape[:2], *([1] * (x0.ndim - 2))))
        return self.setting.path.noised(x0, noise, t)

    def end_input(self, end: Tensor) -> Tensor | None:
        """(B,) the end that networks are told; None where they see (x_t, t) alone."""
        return None

    def reach(self, nets: Nets, role: str, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """x_s (B, C, *S) where that role jumps to from x_t: G(x_t, t, s)."""
        return jump(nets[role](x_t, t, cond, s=self.end_input(s)), s)

    def jumps(self, nets: Nets, batch: Batch, ctx: Ctx) -> Jumps:
        """Student's and target's jump of a fresh draw of times and noise."""
        config, cond = self.config, batch.cond
        index = ctx.randint(0, config.num_grid, batch.bsz)
        g, (t, s) = ctx.between(config.guidance_range, batch.bsz), self.grid.pair(index)
        x_t = self.noised(batch, t, ctx)
        point = self.draw_end(ctx, index, self.num_segments(ctx.step, ctx.max_steps))
        end = self.segments.time(point)
        estimate = self.reach(nets, "student", x_t, t, end, cond)
        x_s = teacher_step(nets["teacher"], x_t, t, s, cond, batch.null, g)
        with torch.no_grad():
            role = "target" if config.target == "ema" else "student"
            target = self.reach(nets, role, x_s, s, end, cond)
        return Jumps(estimate, target, point, index)

    def carry(self, both: Jumps, batch: Batch, ctx: Ctx) -> tuple[Noised, Noised]:
        """(real, fake): target and estimate at one noisier time of their segment.

        By the kernel q(x_s | x_e). PCM's flow code adds noise of std (s - e) / (1 - e), which is
        that of the kernel for e = 0 alone.
        """
        k = self.num_segments(ctx.step, ctx.max_steps)
        end = self.segments.time(both.end)
        t = self.segments.draw_noisier(ctx.rand(batch.bsz), both.end, both.index, k)
        renoise, shape = self.setting.path.renoise, tuple(both.target.shape)
        noise = ctx.randn(shape)
        real = renoise(both.target, end, t, noise)
        other = noise if self.config.gan.same_noise else ctx.randn(shape)
        fake = renoise(both.estimate, end, t, other)
        return (real, t, batch.cond), (fake, t, batch.cond)

    def student_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The distance of the jumps, and what the head thinks of the student's."""
        config, batch = self.config, self._with_prompt_dropout(batch, ctx)
        both, (scale, weight) = self.jumps(nets, batch, ctx), self.weights(ctx)
        loss = weighted_mean(distance(config.loss, both.estimate, both.target, config.huber_c))
        logs, total = {"loss": loss}, scale * loss
        if weight > 0.0:
            _, fake = self.carry(both, batch, ctx)
            logs["gan_g"] = generator_loss(head_logits(nets, config.gan, *fake), config.gan.loss)
            total = total + weight * logs["gan_g"]
        return Losses(total, {name: value.detach() for name, value in logs.items()})

    def disc_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The head's loss on jumps without graph."""
        batch = self._with_prompt_dropout(batch, ctx)
        with torch.no_grad():
            both = self.jumps(nets, batch, ctx)
        sides, gan = self.carry(both, batch, ctx), self.config.gan
        total, logs = noised_disc_loss(nets, gan, ctx, *sides)
        return Losses(gan.weight_d * total, {name: value.detach() for name, value in logs.items()})
