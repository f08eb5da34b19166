"""PSO: pairwise sample optimisation of a model that is distilled already, from pairs of images.

The model of the folder, whoever made it (SDXL-Turbo, DMD2, LCM-LoRA), is both the policy that is
tuned and, its adapter off or as it was loaded, the reference. It learns at the times of its own
scheduler in its own number of steps, and no others: those are the steps it takes, so few-step
sampling stays sharp where the plain denoising loss would blur it. Chosen and rejected image get
the same noise and time; losses/preference.py has the rest.
Source: Miao et al. 2024, arXiv:2410.03190, offline (ICLR 2025), and its released code.
Differs from the code: a sample's weight 1 / sigma^2 is of the path's own sigma unless `weight` is
snr; at t = 1 the model sees pure noise, as in sampling, so that of a one-step model the log-ratio
is exact.
"""

# Shapes: B pairs, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.abilities import Abilities
from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets, Phase, Setting
from stepdistill.core.options import Positive
from stepdistill.core.path import FlowPath
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.losses.preference import hinge, logistic, pair_errors, preference_gap
from stepdistill.methods.own_steps import OwnSteps, OwnStepsConfig


class PreferenceConfig(OwnStepsConfig):
    """Options of preference."""

    num_steps: int = Field(default=4, ge=1)
    """Steps that the distilled model takes, as its folder's scheduler lays them; they stay."""
    student_times: tuple[float, ...] | None = None
    """Those steps' times in (0, 1], descending, to be sure of them: others are refused."""
    loss: Literal["logistic", "hinge"] = "logistic"
    """logistic: the odds against the model as it was; hinge: without it, for a few images of a
    subject or style (released as pso_db)."""
    beta: Positive = 5.0
    """Slope of the loss, per mean error over an image's numbers: 2 beta / d a nat."""
    rejected_weight: float = Field(default=0.1, ge=0)
    """k, of the rejected image's error beside the chosen one's; 1 treats both alike."""
    prior_weight: float = Field(default=0.5, ge=0)
    """Of the rejected images' own error beside the hinge; read by hinge alone."""
    weight: Literal["sigma", "snr"] = "sigma"
    """Of an error at noise level sigma: 1 / sigma^2, or (alpha / sigma)^2 (released), which is the
    same on a VE path and nothing at t = 1 of a flow path."""

    @model_validator(mode="after")
    def _warn_of_prior_weight(self) -> PreferenceConfig:
        if self.changed("prior_weight") and self.loss != "hinge":
            warnings.warn("prior_weight has no effect: only loss hinge reads it.", stacklevel=2)
        return self

    @classmethod
    def unfit(cls, options: Mapping[str, Any], model: Abilities) -> dict[str, tuple[Any, str]]:
        """See MethodConfig."""
        if isinstance(model.path, FlowPath) and options.get("weight") == "snr":
            return {"weight": ("sigma", "the first step of a flow path has a weight of 0 else")}
        return {}


class Preference(OwnSteps[PreferenceConfig]):
    """Offline preference tuning of a few-step model at its own steps."""

    name = "preference"
    paper = "Miao et al. 2024, arXiv:2410.03190"
    Config = PreferenceConfig
    status = "checked on analytic teachers"
    aliases = {"pso": {}, "pairwise_sample_optimization": {}, "pso_db": {"loss": "hinge"}}
    data = "preferences"
    steps = (1, 2, 4, 8)

    def __init__(self, config: PreferenceConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.grid = torch.tensor(self.spec.times, dtype=torch.float64)
        if (asked := config.student_times) is not None:
            wanted = torch.tensor(asked, dtype=torch.float64)
            if wanted.shape != self.grid.shape or bool((wanted - self.grid).abs().max() > 1e-4):
                raise ValueError(
                    f"student_times: expected those that the model's scheduler visits at "
                    f"num_steps {config.num_steps}, {_rounded(self.spec.times)}, got "
                    f"{_rounded(asked)}. Leave it out, or say as call_times what the model's call "
                    "is told."
                )
        if config.weight == "snr" and float(setting.path.coeffs(self.grid)[0].min()) < 1e-6:
            raise ValueError(
                f"weight: expected sigma of a model that begins at pure noise "
                f"({_rounded(self.spec.times[:1])}), got snr, which is 0 there. Set "
                "--method_config.weight sigma."
            )

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.loss, trains=("student",)),)

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The mean loss of pairs at random steps of the model's own."""
        assert batch.x0 is not None, "the trainer checks `needs`"
        config, path = self.config, self.setting.path
        t = self.grid.to(ctx.device)[ctx.randint(0, len(self.grid), batch.bsz)]
        noise = ctx.randn(tuple(batch.x0.shape))
        x0, t = torch.cat([batch.x0, batch.extra["rejected"]]), torch.cat([t, t])
        x_t, cond = path.noised(x0, torch.cat([noise, noise]), t), Cond.cat([batch.cond] * 2)
        alpha, sigma = path.coeffs(t)
        weight = (alpha / sigma if config.weight == "snr" else 1.0 / sigma) ** 2

        def errors(role: str) -> tuple[Tensor, Tensor]:
            return pair_errors(nets[role](x_t, t, cond).x0, x0, weight)

        tuned = errors("student")
        gap = preference_gap(tuned, config.rejected_weight)
        if config.loss == "hinge":
            losses, margin, flat = hinge(tuned, gap, config.beta, config.prior_weight)
        else:
            with torch.no_grad():
                reference = preference_gap(errors("teacher"), config.rejected_weight)
            losses, margin, flat = logistic(gap, reference, config.beta)
        logs = {
            "loss": losses.mean().detach(),
            "margin": margin.mean().detach(),
            "preferred": (margin > 0).float().mean(),
            "flat": flat.float().mean(),
        }
        return Losses(losses.mean(), logs)


def _rounded(times: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(t, 4) for t in times)
