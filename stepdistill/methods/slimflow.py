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

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Nets, Role
from stepdistill.core.path import full, rows
from stepdistill.core.recipe import First, Recipe
from stepdistill.core.times import uniform_times
from stepdistill.core.types import Batch, Losses
from stepdistill.methods.digits import regression
from stepdistill.methods.grid import path_time
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.slimflow_config import SlimFlowConfig

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
    guidance_options = ("guidance",)
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
        start = self.path.snap(torch.tensor([self.config.start_time], dtype=torch.float64))
        return tuple(start.tolist()) if self.config.stage == "distill" else super().trained_times()

    def annealing(self, step: int) -> float:
        """b at a student update: 1 new noise alone, 0 the pair's own."""
        k, law = step / self.config.anneal_steps, self.config.anneal
        if law == "fixed":
            return self.config.anneal_fixed
        if law == "exp":
            return math.exp(-k)
        return 1.0 - min(k, 1.0) if law == "linear" else (1.0 + math.cos(math.pi * min(k, 1.0))) / 2

    def endpoints(self, batch: Batch, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """See Reflow.endpoints: mirrored together, then the noise annealed in stage reflow."""
        x0, noise = super().endpoints(batch, ctx)
        if self.config.flip != "none":
            one = self.config.flip == "batch"
            coin = ctx.times(ctx.shared_rand(), batch.bsz) if one else ctx.rand(batch.bsz)
            mirrored = rows(coin < 0.5, x0)
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
        self, teacher: Denoiser, first_x0: Tensor, start: Tensor, middle: Tensor, batch: Batch
    ) -> Tensor:
        """x0 (B, C, *S) by one Euler step from start to times middle (B,), one more to 0.

        Args: first_x0: (B, C, *S) the student's x0 at start.
        """
        guidance, first = self.config.guidance, torch.ones_like(middle) * self.trained_times()[0]
        if self.config.guide_first == "teacher":
            first_x0 = teacher(start, first, batch.cond, batch.null, guidance).x0
        x_t = teacher.path.step(first_x0, start, first, middle)
        return teacher(x_t, middle, batch.cond, batch.null, guidance).x0
