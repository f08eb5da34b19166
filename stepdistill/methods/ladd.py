"""LADD: adversarial distillation in latents, by heads on the frozen teacher's own features.

The student's x0 at a step of its grid and real latents are noised to levels of a law of their own,
and heads on the teacher's blocks, called with the prompt, tell them apart; nothing else moves the
student, and no fake score is trained. Where real latents are the teacher's guided samples (its
pairs), they carry its guidance; on other images it is never learnt.
Low levels judge texture, high ones layout. A step of the student's grid is drawn for each update.
Sources: Sauer et al. 2024, arXiv:2403.12015; NVlabs/FastGen's ladd (several updates of the heads).
Differs from the paper: one step is drawn for the batch, not one a sample; heads are those of
roles/heads.py; optional, and off by default, is a warm start on the teacher's trajectories.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K heads. t: (B,).

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets, Phase, Role, ScorerSpec, Setting
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.types import Batch, Losses
from stepdistill.methods.digits import heads
from stepdistill.methods.judge import Judge, JudgeGAN
from stepdistill.methods.rollout import Rollout, Sample, TimeRange
from stepdistill.methods.warm_start import WarmStarted, WarmStartedConfig


class LADDGAN(JudgeGAN):
    """Always on. Needs real images."""

    weight_g: float = Field(default=1.0, gt=0)
    """Weight of the generator loss."""
    time_mean: float | None = 1.0
    """Mean of the logit-normal law of rectified-flow times that samples are noised to; none means
    the uniform law of noise_t_range."""


class LADDConfig(WarmStartedConfig):
    """Options of ladd."""

    num_steps: int = Field(default=4, ge=1)
    """Steps of the student, on the uniform grid 1, (N-1)/N, ..., 1/N under the shift."""
    rollout: Literal["pure_noise", "simulate", "data"] = "data"
    """Input of step k: noised real latents, the student's own steps 0..k-1 without gradients, or
    pure noise (one-step students). Step 0 always starts from pure noise."""
    noisiest_share: float | None = Field(default=None, ge=0, le=1)
    """Chance of step 0, the noisiest; the others share the rest. None: all alike (LADD: 0.7)."""
    clean_first: int = Field(default=0, ge=0)
    """Updates at first, behind a warm start, that draw the less noisy half of the steps alone
    (LADD: 500)."""
    noise_t_range: TimeRange = (0.001, 0.999)
    """Noise levels, uniform under the shift, where no gan.time_mean states another law."""
    disc_steps: int = Field(default=1, ge=1)
    """Updates of the heads for each of the student's (FastGen: 4)."""
    gan: LADDGAN = LADDGAN()
    """The heads."""

    @model_validator(mode="after")
    def _check_steps(self) -> LADDConfig:
        idle = self.changed("noisiest_share", "clean_first")
        if idle and self.trained_step == "last":
            warnings.warn(f"{', '.join(idle)} has no effect: trained_step is last.", stacklevel=2)
        return self


L = TypeVar("L", bound=LADDConfig)


class LADD(WarmStarted[L], Generic[L]):
    """A few-step student that heads on the teacher's features tell from real latents."""

    name = "ladd"
    paper = "Sauer et al. 2024, arXiv:2403.12015"
    Config: ClassVar[type[LADDConfig]] = LADDConfig
    status = "trained on real data here"
    aliases = {"latent_adversarial": {}}
    trainer = "AdversarialTrainer"
    data = "images"
    digits = (Recipe("ladd", heads(gan={"blocks": ["all"], "time_mean": -1.0})),)

    def __init__(self, config: L, setting: Setting) -> None:
        super().__init__(config, setting)
        self.rollout = Rollout(config, setting.path, config.trained_times(setting))
        self.judge = Judge(config.gan, setting.path, self.noise_times, self.sample)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond", *({"x0"} if self.config.rollout == "data" else ())}) | (
            self.judge.needs
        )

    def roles(self) -> dict[str, Role]:
        return {"teacher": Role(), "student": Role(train=True), **self.config.gan.roles()}

    def scorers(self) -> dict[str, ScorerSpec]:
        return self.config.gan.scorers()

    def phases(self, step: int) -> Sequence[Phase]:
        """The student's update, then disc_steps of the heads, the first on the same x0. In a warm
        start the student's alone."""
        if self.warming(step):
            return (
                Phase("student", self.warm_loss, ("student",), reads_x0=False, reads_real=False),
            )
        reads = "x0" in self.needs
        student = Phase("student", self.loss, ("student",), reads_x0=reads, reads_real=False)
        return self.judge.phases(student, self.config.disc_steps)

    def noise_times(self, ctx: Ctx, bsz: int) -> Tensor:
        """(B,) float64 noise levels of noise_t_range."""
        return self.config.draw_times(self.setting, ctx.stratified(bsz), self.config.noise_t_range)

    def draw_step(self, ctx: Ctx) -> int:
        """The step of the grid that this update trains, the same on every rank."""
        config, count = self.config, len(self.rollout.times)
        if config.trained_step == "last":
            return count - 1
        if ctx.step - config.warm_start.updates < config.clean_first:
            return ctx.shared_randint(count // 2, count)
        if config.noisiest_share is None or count == 1:
            return ctx.shared_randint(0, count)
        u, share = ctx.shared_rand(), config.noisiest_share
        return 0 if u < share else 1 + int((u - share) / (1.0 - share) * (count - 1))

    def sample(self, nets: Nets, batch: Batch, ctx: Ctx) -> Sample:
        """What the student makes at a step of its grid; its last call carries gradients."""
        return self.rollout.sample_at(nets, batch, ctx, self.draw_step(ctx))

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """What the heads think of the student's sample, beside `others`."""
        sample = self.sample(nets, batch, ctx)
        return self.judge.plus(self.others(nets, batch, ctx, sample), nets, ctx, sample)

    def others(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Losses:
        """Terms beside the heads' on the same sample: none."""
        return Losses(torch.zeros((), device=ctx.device))

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        return self.config.spec(self.setting, num_steps)
