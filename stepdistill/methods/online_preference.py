"""PSO online: a few-step model learns from its own samples, of which a reward picks the winner.

For each prompt the model as it is now makes two images in its own steps; the reward ranks them,
and has no gradient. A step to a noisier-than-clean time s draws x_s from N(mu, std^2), mu by the
network's x0hat: of a sampler that noises anew (LCM, DMD2) mu = alpha_s x0hat; of any other the
same noise as Euler ancestral's, which is DDIM's at eta 1. The last step draws nothing, so it is
not learned from, and one-step models have no such step at all: offline is theirs. With the mean
log-ratio of the model and itself as it was, over an image's d numbers,
    r = (|x_s - mu_ref|^2 - |x_s - mu|^2) / (2 d std^2),  clamped to log(1 +- clip),
    loss = -log sigmoid(beta (r_winner - r_loser)),
so that beta is beta / d a nat. Images that the reward can't tell apart are left out.
Source: Miao et al. 2024, arXiv:2410.03190, online (ICLR 2025), and its released code.
Differs from the code: each update makes samples of its own and learns from them once, where the
code makes some, and goes through all of them in small batches.
"""

# Shapes: B prompts, two samples each, C channels, *S spatial or (F, H, W). t, s: (2B,).

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Nets, Phase, ScorerSpec
from stepdistill.core.recipe import First, Recipe
from stepdistill.core.solvers import boundary_x0
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.losses.preference import log_ratio, online
from stepdistill.methods.digits import SOON, jumps
from stepdistill.methods.online_preference_config import OnlinePreferenceConfig
from stepdistill.methods.own_steps import OwnSteps


class OnlinePreference(OwnSteps[OnlinePreferenceConfig]):
    """Online preference tuning of a few-step model by a reward without gradient."""

    name = "online_preference"
    paper = "Miao et al. 2024, arXiv:2410.03190"
    Config = OnlinePreferenceConfig
    status = "trained on real data here"
    aliases = {"pso_online": {}, "online_pso": {}}
    steps = (2, 4, 8)
    digits = (
        Recipe(
            "online_preference",
            {
                "max_train_steps": 200,
                "learning_rate": 3e-4,
                "method_config": {"reward": {"kind": "digits"}},
            },
            first=First(
                "consistency",
                "consistency",
                jumps(1200, **SOON),
                share=0.7,
                gives="model",
                always=True,
            ),
        ),
    )

    def scorers(self) -> dict[str, ScorerSpec]:
        return {self.config.reward.kind: self.config.reward.spec}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.loss, ("student",), reads_x0=False, reads_real=False),)

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The mean loss of pairs of trajectories at one of their steps, or at each."""
        config, path = self.config, self.setting.path
        cond, shape = Cond.cat([batch.cond] * 2), (2 * batch.bsz, *batch.shape)
        with torch.no_grad():
            states = [path.prior(ctx.randn(shape))]
            for step in range(self.spec.num_steps - 1):
                mean, std = self._step(nets["student"], states[-1], step, cond)
                states.append(mean + std * ctx.randn(shape))
            x0, _ = self._step(nets["student"], states[-1], self.spec.num_steps - 1, cond)
            score = self._score(nets, x0, batch)
        won = (score[: batch.bsz] - score[batch.bsz :]).sign()  # (B,) of the first; 0: neither

        total, logs = x0.new_zeros(()), {"reward": score.mean(), "tied": (won == 0).float().mean()}
        last = self.spec.num_steps - 1
        chosen = range(last) if config.trained_steps == "all" else [ctx.shared_randint(0, last)]
        for step in chosen:
            at, later = states[step], states[step + 1]
            with torch.no_grad():
                reference, std = self._step(nets["teacher"], at, step, cond)
            mean, _ = self._step(nets["student"], at, step, cond)
            ratio = log_ratio(later, mean, reference, std)
            losses, margin, clipped = online(ratio, won, config.beta, config.clip)
            total = total + losses.mean() / len(chosen)
            logs |= {"margin": margin.mean().detach(), "clipped": clipped.float().mean()}
        return Losses(total, {"loss": total.detach(), **logs})

    def _step(self, net: Denoiser, x_t: Tensor, step: int, cond: Cond) -> tuple[Tensor, Tensor]:
        """(mean, std) of the state after a step; of the last, which is x0, a std of 0."""
        path, spec = self.setting.path, self.spec
        t, s = (
            torch.full((len(x_t),), time, dtype=torch.float64, device=x_t.device)
            for time in (*spec.times, 0.0)[step : step + 2]
        )
        pred = net(x_t, t, cond)
        x0 = boundary_x0(pred, spec.boundary_scale, spec.boundary_sigma)
        if step == spec.num_steps - 1:
            return x0, x0.new_zeros(())
        clean = torch.zeros_like(s)

        def after(noise: Tensor) -> Tensor:
            if spec.kind == "renoise":
                return path.renoise(x0, clean, s, noise)
            return path.step(x0, x_t, t, s, 1.0, noise)

        return _mean_and_std(after, x0)

    def _score(self, nets: Nets, x0: Tensor, batch: Batch) -> Tensor:
        """(2B,) of the reward."""
        by = (batch.prompts or ("",) * batch.bsz) * 2
        images = nets.images(x0).clamp(-1.0, 1.0)
        return nets.scorer(self.config.reward.kind)(images, by)


def _mean_and_std(after: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
    """Of a step that is linear in its noise: (mean (2B, C, *S), std as a scalar)."""
    mean = after(torch.zeros_like(like))
    with torch.no_grad():
        std = (after(torch.ones_like(like)) - mean).flatten()[0]
    return mean, std
