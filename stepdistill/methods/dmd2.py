"""DMD2: match the student's noised output distribution to the teacher's with two denoisers.

The score distillation of scores.py as it stands: reverse KL, a two time-scale rule (several updates
of the fake for one of the student) and an optional diffusion GAN, all options of ScoreConfig.
Off by default, three later finds, each plain DMD2 at its neutral value:
    ca_times             where guidance is measured: y_f - y_guided is (y_f - y_r), at one noised
                         sample, minus (g - 1) (y_r - y_null), at another (Decoupled DMD)
    fake_toward_student  fake <- (1 - l) fake + l student after each update (SenseFlow's IDA)
    approach             the teacher carries a share of the fake's adapter that falls to nothing,
                         and times are noisy at first (DMDR)
Sources: Yin et al. 2024, arXiv:2405.14867, and its released code; arXiv:2511.22677 (Decoupled DMD);
arXiv:2506.00523 (SenseFlow); arXiv:2511.13649 (DMDR).
Differs from the papers: times follow the shifted law cut to the range (ports pile mass on its
ends); one normaliser for both terms of Decoupled DMD, that of the guided mean (theirs is unknown).
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from stepdistill.core.causal import causal_input
from stepdistill.core.context import Ctx
from stepdistill.core.method import FakeFit, Nets, Role, Setting
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import beta_times
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.adversarial import generator_loss
from stepdistill.methods.causal import CausalRollout, ode_loss
from stepdistill.methods.digits import FEW, WARM, score
from stepdistill.methods.dmd2_config import DMD2Config
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores import ScoreDistillation, Scores


@dataclass(frozen=True)
class DecoupledScores(Scores):
    """augmentation: (B, C, *S), (g - 1) (y_r - y_null) at noised samples of its own."""

    augmentation: Tensor

    @property
    def wanted(self) -> Tensor:
        return self.real.x0 + self.augmentation


class DMD2(ScoreDistillation[DMD2Config]):
    """Distribution matching with a two time-scale rule and an optional diffusion GAN."""

    name = "dmd2"
    paper = "Yin et al. 2024, arXiv:2405.14867"
    Config = DMD2Config
    serves_part = True
    status = "trained on real data here"
    digits = (Recipe("dmd2", score(guidance=1.0), {2: FEW, 4: FEW}, first=WARM),)

    def __init__(self, config: DMD2Config, setting: Setting) -> None:
        super().__init__(config, setting)
        if config.chunk:
            self.rollout = CausalRollout(**vars(self.rollout), chunk=config.chunk)

    def roles(self) -> dict[str, Role]:
        if not self.config.chunk:
            return super().roles()
        student = Role(train=True, extra_inputs=(causal_input(self.config.chunk),))
        return {**super().roles(), "student": student}

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        return replace(super().sampler(num_steps), chunk=self.config.chunk)

    def warm_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        if not self.config.chunk:
            return super().warm_loss(nets, batch, ctx)
        how = (self.config.warm_start.teacher_steps, self.rollout.times, self.config.chunk)
        loss = ode_loss(
            nets, nets["teacher"], batch, ctx, self.setting, *how, self.teacher_guidance
        )
        return Losses(loss, {"warm_start": loss.detach()})

    @property
    def teacher_guidance(self) -> float:
        return 1.0 if self.config.gan_alone else super().teacher_guidance

    @property
    def fake_fit(self) -> FakeFit | None:
        return None if self.config.gan_alone else super().fake_fit  # then its score moves no one

    @property
    def mixed_roles(self) -> tuple[tuple[str, str], ...]:
        return (("fake", "student"),) if self.config.fake_toward_student else ()

    @property
    def carried_role(self) -> str:
        return "fake" if self.config.approach.share else ""

    def after(self, nets: Nets, step: int) -> None:
        for role, other in self.mixed_roles:
            nets.mix(role, other, self.config.fake_toward_student)

    def draw_levels(self, ctx: Ctx, bsz: int) -> Tensor:
        u, left = super().draw_levels(ctx, bsz), self.config.approach.left(ctx.step)
        if self.config.approach.noisy_first and left > 0.0:
            u = beta_times(u, 1.0 + 3.0 * left, 1.0 + 0.5 * left)
        return u

    def scores(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Scores:
        if share := self.config.approach.share * self.config.approach.left(ctx.step):
            nets = nets.carrying("teacher", "fake", share)
        if self.config.ca_times == "shared" or self.teacher_guidance == 1.0:
            return super().scores(nets, batch, ctx, sample)
        augmentation = self.augmentation(nets, batch, ctx, sample)
        x_t, t, _ = self.noised(ctx, sample, self.config.dm_t_range)
        real, fake = (
            score(nets, batch, x_t, t, 1.0) for score in (self.teacher_score, self.fake_score)
        )
        return DecoupledScores(real, fake, augmentation)

    def augmentation(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Tensor:
        """(B, C, *S), what guidance adds to the teacher's mean, below the student's step."""
        assert sample.t is not None, "a sample of the student's"
        x_t, t, _ = self.noised(ctx, sample, self.config.dm_t_range, (0.0, sample.t))
        guided = self.teacher_score(nets, batch, x_t, t, self.draw_guidance(ctx))
        if guided.unguided is None:  # told to the network itself
            return guided.x0 - self.teacher_score(nets, batch, x_t, t, 1.0).x0
        return guided.x0 - replace(guided, raw=guided.unguided).x0

    def sample_loss(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Losses:
        if not self.config.gan_alone:
            return super().sample_loss(nets, batch, ctx, sample)
        logits, gan = self.student_logits(nets, batch, ctx, sample, None), self.config.gan
        gan_g = generator_loss(logits, gan.loss)
        return Losses(gan.weight_g * gan_g, {"gan_g": gan_g.detach()})
