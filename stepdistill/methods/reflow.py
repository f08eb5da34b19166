"""Rectified flow on the teacher's own pairs: straighten (reflow), then one call (distill).

Pairs (noise, x0) come from the teacher's guided ODE (stepdistill pairs), so nothing is guided here.
With flow = noise - x0 and x_t on the student's path:
    reflow   | flow_student(x_t, t) - (noise - x0) |^2 over all t
    distill  d( x0_student(x_t, t), x0 ) on the k times the sampler visits
Set-ups: wrapped keeps the teacher's path and prediction (exact at step 0: x_t = alpha x0 + sigma
eps is the straight line divided by alpha + sigma); raw reads the output as velocity, told 1000 t.
Where alpha is not 0 at t = 1 the line's end is not noise but what makes x_1 the prior itself, as
in sampling (NoisePath.line_to_prior).
Sources: Liu et al. 2022, arXiv:2209.03003; Liu et al. 2023 (InstaFlow), arXiv:2309.06380.
Differs from the papers: wrapped is the default (InstaFlow is raw); their u is -flow.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Prediction
from stepdistill.core.method import Method, Nets, Phase, Role, ScorerSpec, Setting
from stepdistill.core.path import NoisePath, VEPath, flow_time, full
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import grid_times, snapped_grid, uniform_times
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.regression import distance, weighted_mean
from stepdistill.methods.digits import regression
from stepdistill.methods.grid import path_time
from stepdistill.methods.perceptual import judged, pair_distance
from stepdistill.methods.reflow_config import ReflowConfig


class Reflow(Method[ReflowConfig]):
    """2-rectified flow on generated pairs, and its distillation to k steps."""

    name = "reflow"
    paper = "Liu et al. 2022, arXiv:2209.03003; Liu et al. 2023, arXiv:2309.06380"
    Config = ReflowConfig
    status = "trained on real data here"
    aliases = {"rectified_flow": {}, "instaflow": {"setup": "raw"}}
    trainer = "ReflowTrainer"
    data = "pairs"
    settings_file = "reflow_distill"  # stage reflow ends in no few-step student
    digits = (Recipe("reflow", regression(stage="distill")),)

    def __init__(self, config: ReflowConfig, setting: Setting) -> None:
        if config.setup == "raw" and isinstance(setting.path, VEPath):
            raise ValueError(
                "reflow: expected setup wrapped for an EDM-type teacher (its preconditioning is no "
                "velocity), got raw. Set setup: wrapped."
            )
        super().__init__(config, setting)

    @property
    def path(self) -> NoisePath:
        """The student's own path, what `nets["student"].path` will be."""
        path = self.setting.path
        return path.as_flow() if self.config.setup == "raw" else path

    def roles(self) -> dict[str, Role]:
        return {"student": Role(train=True, as_flow=self.config.setup == "raw")}

    def scorers(self) -> dict[str, ScorerSpec]:
        return {"lpips": self.config.lpips.spec} if judged(self.config.loss) else {}

    def phases(self, step: int) -> Sequence[Phase]:
        loss = self.reflow_loss if self.config.stage == "reflow" else self.distill_loss
        return (Phase("student", loss, trains=("student",)),)

    def endpoints(self, batch: Batch, ctx: Ctx) -> tuple[Tensor, Tensor]:
        """(x0, noise), each (B, C, *S): the ends of the line that is learnt."""
        assert batch.x0 is not None, "the trainer checks `needs`"
        assert batch.noise is not None, "the trainer checks `needs`"
        return batch.x0, batch.noise

    def draw_times(self, ctx: Ctx, bsz: int) -> Tensor:
        """(B,) rectified-flow times of stage reflow, 0 data and 1 noise."""
        return uniform_times(ctx.rand(bsz), *self.config.t_range)

    def velocity_loss(self, pred: Prediction, x0: Tensor, end: Tensor) -> Tensor:
        """|flow - (end - x0)|^2, arXiv:2209.03003, Eq. 1 (its x_1 is our x0)."""
        return weighted_mean(distance("l2", pred.flow, full(end) - full(x0)))

    def reflow_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """Mean velocity error on the straight lines between the ends of the pairs."""
        x0, noise = self.endpoints(batch, ctx)
        student = nets["student"]
        t = path_time(student.path, self.draw_times(ctx, batch.bsz))
        x_t, end = student.path.line_to_prior(x0, noise, t)
        total = self.velocity_loss(student(x_t, t, batch.cond), x0, end)
        return Losses(total, {"loss": total.detach()})

    def distill_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """Distance of x0 at the sampler's times, weighted (tau_1 / tau_t)^2.

        As |d flow| = |d x0| / tau, l2 then weighs velocity errors alike over the k times (released
        k-step code); with k = 1 the weight is 1.
        """
        x0, noise = self.endpoints(batch, ctx)
        student, path = nets["student"], nets["student"].path
        trained = self.trained_times()
        t, _ = grid_times(ctx.rand(batch.bsz), trained)
        x_t, _ = path.line_to_prior(x0, noise, t, trained[0])
        weight = (flow_time(path, torch.full_like(t, trained[0])) / flow_time(path, t)) ** 2
        pred = student(x_t, t, batch.cond)
        error = self.x0_distance(nets, pred.x0, full(x0))
        total = (weight.to(error.dtype) * error).mean()
        return Losses(total, {"loss": total.detach()})

    def x0_distance(self, nets: Nets, x0: Tensor, target: Tensor) -> Tensor:
        """(B,) the configured distance of x0 to a target, which gets no gradient."""
        return pair_distance(nets, self.config.loss, x0, target, self.config.huber_c)

    def trained_times(self) -> tuple[float, ...]:
        """Stage distill's grid, on the table of a VP path."""
        student_times = self.config.student_times
        if student_times is None:
            return self.times(self.config.num_steps)
        return tuple(self.path.snap(torch.tensor(student_times, dtype=torch.float64)).tolist())

    def times(self, num_steps: int) -> tuple[float, ...]:
        """The uniform grid on the student's path, on its table: DDIM's trailing spacing on VP."""
        return snapped_grid(self.path, num_steps)

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """Deterministic steps; after stage distill only on the trained grid."""
        grid = self.trained_times()
        times = grid if num_steps in (None, len(grid)) else self.times(num_steps or 1)
        return SamplerSpec(times, "ode", None if self.config.stage == "reflow" else grid)
