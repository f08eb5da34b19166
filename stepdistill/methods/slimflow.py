"""SlimFlow: a small one-step student that the teacher's weights cannot initialise.

Stage reflow (annealing reflow), with fresh noise e' and b falling from 1 to 0 over the run:
    e_b = sqrt(1 - b^2) noise + b e',   | flow_student(x_t, t) - (e_b - x0) |^2
b = 1 is plain rectified flow on the teacher's samples, b = 0 is reflow. Stage distill:
    d( g(noise), x0 ) + d( g(e'), two Euler steps of the straight teacher from e' ),  g one call
The first step, to a random time in `guide_range`, is the student's own answer (or the teacher's),
the second the teacher's; nothing of that target gets gradients. In stage distill the model is the
exported result of stage reflow: teacher and student begin alike.
Source: Zhu et al. 2024, arXiv:2407.12718, and its released code.
Differs from the paper: the first step is the student's and times are in [0.2, 0.8], as released.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Nets, Role
from stepdistill.core.path import full
from stepdistill.core.recipe import First, Recipe
from stepdistill.core.times import uniform_times
from stepdistill.core.types import Batch, Losses
from stepdistill.methods.digits import regression
from stepdistill.methods.grid import path_time
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.reflow_config import ReflowConfig


class SlimFlowConfig(ReflowConfig):
    anneal: Literal["linear", "cos", "fixed"] = "linear"
    """Law of b over student updates: 1 - k / K, cos(pi k / 2 K), or anneal_fixed throughout."""
    anneal_steps: int = Field(default=300000, ge=1)
    """K, the student updates after which b is 0."""
    anneal_fixed: float = Field(default=0.0, ge=0, le=1)
    """b of anneal fixed."""
    flip: Literal["none", "batch", "sample"] = "none"
    """Mirror noise and x0 together, by one coin a batch (released code) or one a sample. For
    teachers that treat left and right alike; not for prompts that name them."""
    guide_weight: float = Field(default=1.0, ge=0)
    """Weight of stage distill's online term; 0 leaves plain distillation."""
    guide_range: tuple[float, float] = (0.2, 0.8)
    """Rectified-flow times between the teacher's two steps, uniform."""
    guide_first: Literal["student", "teacher"] = "student"
    """Who takes the first of the two steps; the student's costs no call."""
    start_time: float = Field(default=1.0, gt=0, le=1)
    """Time told to stage distill's one call, of pure noise all the same; 0.999 as released."""
    guidance: float = Field(default=1.0, ge=0)
    """The teacher's guidance in stage distill, g of null + g (cond - null)."""

    @model_validator(mode="after")
    def _one_step(self) -> SlimFlowConfig:
        low, high = self.guide_range
        if not 0 < low < high < self.start_time:
            raise ValueError(f"guide_range: expected 0 < low < high < start_time, got {low, high}.")
        if self.stage == "distill" and self.setup == "raw":
            raise ValueError(
                "setup: expected 'wrapped' in stage distill, got 'raw': the teacher of that stage "
                "is the straight model itself, exported by stage reflow with its own scheduler."
            )
        if self.stage == "distill" and (self.num_steps > 1 or self.student_times is not None):
            raise ValueError(
                f"num_steps: expected 1 and no student_times in stage distill, got "
                f"{self.num_steps} and {self.student_times}. reflow distils to k steps."
            )
        return self


# The digits' small student.
SMALL = First(
    "small student",
    "slimflow",
    {
        "tuning": {"student": "full", "student_config": {"block_out_channels": [8, 24]}},
        **regression(stage="reflow", setup="raw", anneal_steps=1000),
    },
    share=0.6,
    gives="model",
)


class SlimFlow(Reflow):
    """Annealing reflow, and one-step distillation guided by the straight teacher."""

    name = "slimflow"
    paper = "Zhu et al. 2024, arXiv:2407.12718"
    Config = SlimFlowConfig
    status = "trained on real data here"
    steps = (1,)
    digits = (
        Recipe("slimflow", regression(1000, stage="distill"), first=SMALL, layouts=("full",)),
    )
    config: SlimFlowConfig

    @property
    def guided(self) -> bool:
        """Whether stage distill's online term is on."""
        return self.config.stage == "distill" and self.config.guide_weight > 0.0

    def roles(self) -> dict[str, Role]:
        return {**super().roles(), **({"teacher": Role()} if self.guided else {})}

    def trained_times(self) -> tuple[float, ...]:
        """See Reflow.trained_times: in stage distill start_time alone."""
        own = self.path.snap(torch.tensor([self.config.start_time], dtype=torch.float64))
        return tuple(own.tolist()) if self.config.stage == "distill" else super().trained_times()

    def annealing(self, step: int) -> float:
        """b at a student update: 1 new noise alone, 0 the pair's own."""
        done = min(1.0, step / self.config.anneal_steps)
        if self.config.anneal == "fixed":
            return self.config.anneal_fixed
        if self.config.anneal == "cos":
            return math.cos(0.5 * math.pi * done) if done < 1.0 else 0.0
        return 1.0 - done

    def endpoints(self, batch: Batch, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """See Reflow.endpoints: mirrored together, then the noise annealed in stage reflow."""
        x0, noise = super().endpoints(batch, ctx)
        if self.config.flip != "none":
            one = self.config.flip == "batch"
            coin = ctx.times(ctx.shared_rand(), batch.bsz) if one else ctx.rand(batch.bsz)
            mirrored = (coin < 0.5).view(-1, *([1] * (x0.ndim - 1)))
            x0, noise = (torch.where(mirrored, x.flip(-1), x) for x in (x0, noise))
        b = self.annealing(ctx.step) if self.config.stage == "reflow" else 0.0
        if b > 0.0:
            fresh = ctx.randn(tuple(noise.shape)).to(noise.device)
            noise = math.sqrt(1.0 - b**2) * full(noise) + b * fresh
        return x0, noise

    def distill_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The pairs' own term, and the distance to the teacher's two steps from fresh noise.

        Source: arXiv:2407.12718, Eq. 9-10. In x0: e - (1 - t) v_1 - t v_t = x0_teacher(x_t, t).
        """
        offline = super().distill_loss(nets, batch, ctx).total
        if not self.guided:
            return Losses(offline, {"loss": offline.detach()})
        student, teacher, config = nets["student"], nets["teacher"], self.config
        path, first = student.path, ctx.times(self.trained_times()[0], batch.bsz)
        start = path.prior(ctx.randn((batch.bsz, *batch.shape)))
        middle = path_time(path, uniform_times(ctx.rand(batch.bsz), *config.guide_range))
        x0 = student(start, first, batch.cond).x0
        target = self.two_steps(teacher, x0.detach(), start, middle, batch)
        online = self.x0_distance(nets, x0, target).mean()
        total = offline + config.guide_weight * online
        return Losses(total, {"offline": offline.detach(), "online": online.detach()})

    @torch.no_grad()
    def two_steps(
        self, teacher: Denoiser, own: Tensor, start: Tensor, middle: Tensor, batch: Batch
    ) -> Tensor:
        """x0 (B, C, *S) by one Euler step from start to times middle (B,), one more to 0.

        Args: own: (B, C, *S) the student's x0 at start.
        """
        guidance, first = self.config.guidance, torch.ones_like(middle) * self.trained_times()[0]
        if self.config.guide_first == "teacher":
            own = teacher(start, first, batch.cond, batch.null, guidance).x0
        x_t = teacher.path.step(own, start, first, middle)
        return teacher(x_t, middle, batch.cond, batch.null, guidance).x0
