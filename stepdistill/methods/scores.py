"""Score distillation: the base of methods that move a student by the difference of two denoisers.

The frozen teacher ("real") and a "fake" denoiser fitted to the student's samples see the same
noised sample; the difference of their denoised means is the student's gradient (losses/score.py).
A method is a page: a Config on ScoreConfig and, of these hooks, the ones it needs otherwise.

    phases         the student's update, then critic_steps updates of the fake and the head
    student_loss   `sample`, then `sample_loss`; terms beside them are added by `Losses.plus`
    sample         what the student makes, with graph: x0, condition, its input and time
    noised         a sample at a random noise level (`draw_levels`), for both losses
    draw_guidance  g of an update; `guidances` what teacher and fake make of it
    teacher_score  a network's prediction at (x_t, t); a snapshot in its place, or another
    fake_score       condition, is a matter of these two alone. Without graph, but of methods that
                     say `through_scores` (Score identity Distillation)
    scores         both at one (x_t, t); more points or predictions in a `Scores` of its own
    gradient       the gradient on x0 that the scores ask for
    matching       the scalar that carries it, or a loss of the scores without such a gradient
    student_logits the head's judgement of the sample; `sample_weights` reads factors off it
    denoising      the fake's loss on a sample, under `fake_cond` and `fitted_guidance`, against
                     `fitted_pair`
    warm_loss      the student's loss in the first warm_start.updates updates (warm_start.py). The
                     fake, which starts at the teacher, is fitted meanwhile, so that it knows the
                     student when matching begins.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K heads. t: (B,).

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser, Prediction
from stepdistill.core.method import FakeFit, Nets, Phase
from stepdistill.core.path import expand
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.adversarial import generator_loss
from stepdistill.losses.score import dmd_gradient, surrogate
from stepdistill.methods.critic import CriticMethod
from stepdistill.methods.judge import sample_logits
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores_config import ScoreConfig

S = TypeVar("S", bound=ScoreConfig)


@dataclass(frozen=True)
class Scores:
    """What teacher (real) and fake predict for the same noised sample."""

    real: Prediction
    fake: Prediction

    @property
    def wanted(self) -> Tensor:
        """(B, C, *S) the mean that the student's samples are moved to."""
        return self.real.x0


class ScoreDistillation(CriticMethod[S], Generic[S]):
    """Base of score distillation: the module's docstring is the contract of its hooks."""

    guidance_options: ClassVar[tuple[str, ...]] = ("guidance",)
    trainer: ClassVar[str] = "DistributionMatchingTrainer"
    through_scores: ClassVar[bool] = False  # whether the student's gradient goes through both

    @property
    def fake_fit(self) -> FakeFit | None:
        teacher, fake = self.guidances(0.5 * sum(self.guidance_of(self.config)))
        return FakeFit(teacher, fake, self.fitted_guidance, self.config.trained_step == "last")

    @property
    def skip_layers(self) -> tuple[str, ...]:
        return self.config.skip_layers

    def phases(self, step: int) -> Sequence[Phase]:
        loss = self.warm_loss if self.warming(step) else self.student_loss
        reads = "x0" in self.needs
        student = Phase("student", loss, ("student",), reads_x0=reads, reads_real=False)
        return student, self.critic_phase()

    def student_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        sample = self.sample(nets, batch, ctx)
        ctx.carry["sample"] = sample.detach()
        losses = self.sample_loss(nets, batch, ctx, sample)
        return replace(losses, sample=sample.x0) if self.rollout.shown else losses

    def sample_loss(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Losses:
        """What the student's sample costs: `matching` and, where there is a head, its judgement."""
        scores, gan = self.scores(nets, batch, ctx, sample), self.config.gan
        if not gan.enabled:
            dm = self.matching(sample, scores)
            return Losses(dm, {"dm": dm.detach()})
        logits = self.student_logits(nets, batch, ctx, sample, scores)
        dm = self.matching(sample, scores, self.sample_weights(ctx, scores.fake.t, logits.detach()))
        gan_g = generator_loss(logits, gan.loss)
        return Losses(dm, {"dm": dm.detach()}).plus(gan.weight_g, gan_g, gan_g=gan_g)

    def draw_guidance(self, ctx: Ctx) -> float:
        """g of this update, the same on all ranks: the option's, or uniform on its range."""
        low, high = self.guidance_of(self.config)
        return low if low == high else low + (high - low) * ctx.shared_rand()

    def guidances(self, g: float) -> tuple[float, float]:
        """Guidance of (teacher, fake) in the student's gradient; only the teacher's in DMD."""
        return g, 1.0

    def scores(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Scores:
        x_t, t, _ = self.noised(ctx, sample, self.config.dm_t_range)
        g_real, g_fake = self.guidances(self.draw_guidance(ctx))
        fake = self.fake_score(nets, batch, x_t, t, g_fake)
        return Scores(self.teacher_score(nets, batch, x_t, t, g_real), fake)

    def teacher_score(
        self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, g: float
    ) -> Prediction:
        return self._score(nets["teacher"], batch, x_t, t, g)

    def fake_score(self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, g: float) -> Prediction:
        return self._score(nets["fake"], batch, x_t, t, g)

    def _score(self, net: Denoiser, batch: Batch, x_t: Tensor, t: Tensor, g: float) -> Prediction:
        with torch.set_grad_enabled(self.through_scores and torch.is_grad_enabled()):
            return net.skipping(self.skip_layers)(x_t, t, batch.cond, batch.null, g)

    @torch.no_grad()
    def gradient(self, sample: Sample, scores: Scores) -> Tensor:
        """(B, C, *S) wanted gradient on x0, without graph."""
        coeffs = self.setting.path.coeffs(scores.real.t)
        return dmd_gradient(sample.x0, scores.wanted, scores.fake.x0, self.config.weight, coeffs)

    def matching(self, sample: Sample, scores: Scores, weights: Tensor | None = None) -> Tensor:
        """Scalar whose gradient in x0 is `gradient` (over numel), times weights (B,) if given."""
        grad = self.gradient(sample, scores)
        return surrogate(sample.x0, grad if weights is None else expand(weights, grad) * grad)

    def student_logits(
        self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample, scores: Scores | None
    ) -> Tensor:
        """(B, K) logits of the student's samples, at a noise level of their own as in DMD2."""

        def noised() -> tuple[Tensor, Tensor]:
            return self.noised(ctx, sample, self.config.fake_t_range)[:2]

        return sample_logits(nets, self.config.gan, ctx, self.setting.path, sample, noised)

    def sample_weights(self, ctx: Ctx, t: Tensor, logits: Tensor) -> Tensor | None:
        """(B,) factors on the gradient, or None for reverse KL's 1."""
        return None
