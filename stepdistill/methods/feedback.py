"""Feedback: a student that is distilled already, moved by the run's rewards near where it began.

The rewards (training/rewards.py) judge what the student's own few steps make; the loss here is an
anchor at that very step, to the network as it was when the run began (its `reference`):
    rewards + a mean (x0 - x0_ref)^2,   both of the same x_t and t.
For a score c.x0 of weight w it holds at x0_ref + w c N / (2 a), N the numbers of a sample: the
anchor says how far a reward may push.
Sources: Ren et al. 2024, arXiv:2404.13686 (Hyper-SD's feedback stage, by its authors without an
anchor); Xu et al. 2023, arXiv:2304.05977 (ReFL, with a denoising loss on images beside it).
Differs from the papers: the anchor is the student itself, so that no images are needed.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field

from stepdistill.core.context import Ctx
from stepdistill.core.method import Method, Nets, Phase, Role, Setting
from stepdistill.core.recipe import First, Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.regression import squared_error, weighted_mean
from stepdistill.methods.digits import regression
from stepdistill.methods.rollout import Rollout, RolloutConfig


class FeedbackConfig(RolloutConfig):
    """Options of feedback; the grid is the one that the student was distilled for."""

    anchor: float = Field(default=1.0, ge=0)
    """Weight of the squared distance to the student as it was; 0 (Hyper-SD) leaves rewards alone,
    and keeps no copy of it."""
    anchor_on: Literal["x0", "v"] = "x0"
    """The view of both predictions that the anchor compares."""


class Feedback(Method[FeedbackConfig]):
    """Rewards and an anchor, for a student that makes images in few steps already."""

    name = "feedback"
    paper = "Ren et al. 2024, arXiv:2404.13686; Xu et al. 2023, arXiv:2304.05977"
    Config = FeedbackConfig
    status = "trained on real data here"
    aliases = {"refl": {"trained_step": "last"}, "draft": {"trained_step": "last", "anchor": 0.0}}
    trainer = "PreferenceTrainer"
    needs_rewards = True
    digits = (
        Recipe(
            "feedback",
            {
                "max_train_steps": 400,
                "learning_rate": 3e-4,
                "method_config": {"sampler": "ode", "trained_step": "last"},
                "rewards": [
                    {"kind": "digits", "weight": 0.1, "tau": 0.9},
                    {"kind": "digits_held_out", "weight": 0.0},
                ],
            },
            first=First(
                "regression", "reflow", regression(stage="distill"), share=0.7, always=True
            ),
        ),
    )

    def __init__(self, config: FeedbackConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.rollout = Rollout(config, setting.path, config.trained_times(setting))

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"cond", *({"x0"} if self.config.rollout == "data" else ())})

    def roles(self) -> dict[str, Role]:
        reference = {"reference": Role(ema_of="student")} if self.config.anchor > 0.0 else {}
        return {"student": Role(train=True), **reference}

    def phases(self, step: int) -> Sequence[Phase]:
        reads_x0 = self.config.rollout == "data"
        return (Phase("student", self.loss, ("student",), reads_x0=reads_x0, reads_real=False),)

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The anchor of a sample of the student's, which the rewards judge."""
        sample, config = self.rollout.sample(nets, batch, ctx), self.config
        losses = Losses(0.0 * sample.x0.float().mean(), sample=sample.x0)
        if config.anchor == 0.0:
            return losses
        assert sample.x_t is not None, "the student's own sample has an input"
        assert sample.t is not None, "as above"
        with torch.no_grad():
            wanted = nets["reference"](sample.x_t, sample.t, batch.cond).as_type(config.anchor_on)
        made = self.setting.path.convert(sample.x0, sample.x_t, sample.t, "x0", config.anchor_on)
        anchor = weighted_mean(squared_error(made, wanted))
        return losses.plus(config.anchor, anchor, anchor=anchor)

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        return self.config.spec(self.setting, num_steps)
