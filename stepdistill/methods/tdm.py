"""TDM: trajectory distribution matching, each step of a student judged on its own noise levels.

The student runs its K steps without noise between them, x_m being the state at the end of step k
(time t_m, 0 for the last). Noise carries it on to t in [t_m, t_k], the levels of that step:
    x_t = r x_m + beta z,   r = alpha_t / alpha_m,   beta^2 = sigma_t^2 - r^2 sigma_m^2,
and there the distributions of student and teacher are matched, as in DMD2, by a gradient on the
step's x0. Noise between x_m and x0 depends on x0, so the fake is not fitted to x0 but to the score
of x_t given x_m, whose mean given x_t is that of x_t:
    |(beta / sigma_t) eps_f - z|^2,
in any space the error of (x_t - sigma_t^2 z / beta) / alpha_t, (sigma_t / beta) z, times
(beta / sigma_t)^2 and what an error of eps becomes there: alpha_t grows small at the noisy end, 0
in a table of zero terminal SNR. At t_m = 0 it is the plain regression on x0, so one step is DMD2.
Sources: Luo et al. 2025, arXiv:2503.06674; Fan et al. 2025, arXiv:2510.27684 (the score of a
sub-interval).
Differs from the paper's demo: its fake regresses x0 in every step, which gives half the teacher's
denoiser in the first of four; its windows leave out a hundredth of the times at their upper end.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets
from stepdistill.core.path import expand
from stepdistill.core.recipe import Recipe
from stepdistill.core.types import Batch
from stepdistill.methods.digits import score
from stepdistill.methods.rollout import Sample, TimeRange, Within
from stepdistill.methods.scores import ScoreDistillation
from stepdistill.methods.scores_config import ScoreConfig

# Of beta over sigma, and of alpha: at t = t_m, and at alpha 0, there is nothing to learn, and no
# division by 0.
_SMALLEST = 1e-4


class TDMConfig(ScoreConfig):
    """Options of tdm, besides those of every score distillation."""

    num_steps: int = Field(default=4, ge=1)
    """Steps of the student, on the uniform grid 1, (N-1)/N, ..., 1/N under the shift."""
    sampler: Literal["ode"] = "ode"
    """Between steps: the deterministic step. Inference does the same."""
    rollout: Literal["pure_noise", "simulate"] = "simulate"
    """Input of step k: pure noise (one-step students), or the student's own steps 0..k-1."""
    windows: Literal["own", "to_noise"] = "own"
    """Noise levels a step is judged on: from its end to its start, or to the range's noisy end."""


@dataclass(frozen=True)
class Step(Sample):
    """A step of the student's rollout, from time start to end. x_m: (B, C, *S) where it ends, None
    for x0 itself."""

    x_m: Tensor | None = None
    start: float = 1.0
    end: float = 0.0


class TDM(ScoreDistillation[TDMConfig]):
    """Distribution matching along a deterministic rollout, step by step."""

    name = "tdm"
    paper = "Luo et al. 2025, arXiv:2503.06674"
    Config = TDMConfig
    status = "trained on real data here"
    aliases = {"trajectory_distribution_matching": {}}
    serves_part = True
    steps = (2, 4, 8)
    digits = (Recipe("tdm", score(guidance=1.0), {2: {}, 4: {}}),)

    def sample(self, nets: Nets, batch: Batch, ctx: Ctx) -> Step:
        """A step of the rollout; its x0 alone carries gradients, not where the step ends."""
        last = self.config.hand_over(self.setting)
        times, k = (*self.rollout.times, last), self.rollout.draw_step(ctx)
        made, x_m = self.rollout.sample_at(nets, batch, ctx, k), None
        if times[k + 1] > 0.0:
            assert made.x_t is not None, "a sample of the student's"
            assert made.t is not None, "as above"
            end = ctx.times(times[k + 1], batch.bsz)
            x_m = self.setting.path.step(made.x0.detach(), made.x_t, made.t, end)
        return Step(**vars(made), x_m=x_m, start=times[k], end=times[k + 1])

    def noised(
        self, ctx: Ctx, sample: Sample, t_range: TimeRange, within: Within | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t (B, C, *S), t (B,), noise (B, C, *S)) from the end of the sample's step on."""
        if not isinstance(sample, Step):  # real images
            return super().noised(ctx, sample, t_range, within)
        span = (sample.end, sample.start if self.config.windows == "own" else 1.0)
        if sample.x_m is None:
            return super().noised(ctx, sample, t_range, span)
        t = self.draw_times(ctx, len(sample.x0), t_range, span)
        noise, end = ctx.randn(tuple(sample.x0.shape)), torch.full_like(t, sample.end)
        return self.setting.path.renoise(sample.x_m, end, t, noise), t, noise

    def fitted_pair(
        self, sample: Sample, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What gives the score of x_t given the step's end, in the error of any space."""
        if not isinstance(sample, Step) or sample.x_m is None:
            return super().fitted_pair(sample, x_t, t, noise)
        path = self.setting.path
        (alpha, sigma), (_, beta) = path.coeffs(t), path.travel(torch.full_like(t, sample.end), t)
        share, alpha = (beta / sigma).clamp_min(_SMALLEST), alpha.clamp_min(_SMALLEST)
        eps = noise / expand(share, noise)
        x0 = (x_t - expand(sigma, noise) * eps) / expand(alpha, noise)
        factors = {"x0": alpha / sigma, "eps": torch.ones_like(alpha)}
        by_eps = factors.get(self.config.error_space(self.setting), alpha)
        return x0, eps, (share * by_eps) ** 2
