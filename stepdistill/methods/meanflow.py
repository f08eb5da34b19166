"""MeanFlow, sCM and rCM: the residual of the flow map along the teacher's trajectory, driven to 0.

The student's u(x_t, t, r) is the average velocity between t and r, and `residual` says by how much
it fails to be: D. The loss moves u by D / (|D| + c)^p. With r = 0, f = x_t - t u is a consistency
function and D its derivative along the trajectory: normalised, the tangent of sCM (cosine 1). On a
VP path sCM's circle with sigma_data 1 is the path itself.
rCM adds the distribution matching of scores.py on the student's own samples, SANA-Sprint heads on
the teacher's features (judge.py) of what the student makes in a second call.
Sources: Geng et al. 2025, arXiv:2505.13447; Lu and Song 2024, arXiv:2410.11081; Zheng et al. 2025
(rCM), arXiv:2510.08431; Chen et al. 2025 (SANA-Sprint), arXiv:2503.09641.
Differs from the papers: sCM's learned weight is left out; its c is relative to |D|, not to
cos t / (sin t + cos t)^2 |D|; times of a VP teacher lie on its table.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t, r: (B,).

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import FakeFit, Nets, Phase, Role, Setting
from stepdistill.core.path import VPPath, expand, flow_time
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.regression import per_sample
from stepdistill.losses.score import surrogate
from stepdistill.methods.digits import residual_recipe, score
from stepdistill.methods.grid import drawn_times, warn_end_is_told
from stepdistill.methods.judge import Judge
from stepdistill.methods.meanflow_config import LADD, SCM, MeanFlowConfig
from stepdistill.methods.residual import residual, residual_weight
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores import ScoreDistillation


class MeanFlow(ScoreDistillation[MeanFlowConfig]):
    """The residual of the average velocity, normalised; optionally beside distribution matching."""

    name = "meanflow"
    paper = "Geng et al. 2025, arXiv:2505.13447; Lu and Song 2024, arXiv:2410.11081"
    Config = MeanFlowConfig
    status = "trained on real data here"
    aliases = {"scm": SCM, "rcm": {**SCM, "matching": 1.0}, "sana_sprint": {**SCM, "gan": LADD}}
    trainer = "ConsistencyTrainer"
    data = "images"
    digits = (
        Recipe("meanflow", {**residual_recipe(time_mean=1.5), "learning_rate": 3e-4}),
        Recipe("scm", residual_recipe(**SCM, h=0.05)),
        Recipe("rcm", score(guidance=1.0, **SCM, time_mean=0.0, time_std=1.5, matching=1.0)),
    )

    def __init__(self, config: MeanFlowConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        if self.forward_mode and isinstance(setting.path, VPPath):
            raise ValueError(
                "estimator: expected backward or alphaflow for a teacher with a table of times "
                "(between its entries no derivative was trained), got jvp. Set estimator: backward."
            )
        if config.r == "general":
            warn_end_is_told("r general", "r: zero or phases")
        self.judge = Judge(config.gan, setting.path, lambda ctx, bsz: self.draw_pair(ctx, bsz)[0])
        # Ends of phases, ascending from clean data.
        self.edges = torch.tensor((0.0, *self.rollout.times[::-1]), dtype=torch.float64)

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"x0"}

    @property
    def forward_mode(self) -> bool:
        return self.config.estimator == "jvp"

    @property
    def fake_fit(self) -> FakeFit | None:
        return super().fake_fit if self.config.matching else None

    def roles(self) -> dict[str, Role]:
        extra = ("s",) if self.config.r == "general" else ()
        roles = {"teacher": Role(), "student": Role(train=True, extra_inputs=extra)}
        others = super().roles() if self.config.matching else self.config.gan.roles()
        return {**others, **roles}

    def phases(self, step: int) -> Sequence[Phase]:
        student, fake = super().phases(step)
        return (student, fake) if self.config.matching else self.judge.phases(student)

    def student_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The residual's loss and, behind the warm-up, what the student's own samples cost."""
        losses, config = self.residual_loss(nets, batch, ctx), self.config
        if config.gan.enabled and not config.matching:
            return self.judge.plus(losses, nets, ctx, self.judged(nets, batch, ctx))
        if not config.matching or config.ramp(ctx.step) < 1.0:
            return losses
        matched = super().student_loss(nets, batch, ctx)
        return losses.plus(config.matching, matched.total, **matched.logs)

    def judged(self, nets: Nets, batch: Batch, ctx: Ctx) -> Sample:
        """What heads judge: the end of the student's own steps or, with r zero, its x0."""
        if self.config.r != "zero":
            return self.rollout.sample_at(nets, batch, ctx, len(self.rollout.times) - 1)
        pure = ctx.rand(batch.bsz) < self.config.pure_noise
        t = torch.where(pure, self.rollout.times[0], self.draw_pair(ctx, batch.bsz)[0])
        return self.rollout.from_data(nets, batch, ctx, t, pure)

    def residual_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """Moves u by its weighted, normalised residual D; logs the mean square of D itself."""
        x0, config, path = batch.x0, self.config, self.setting.path
        assert x0 is not None, "the trainer checks `needs`"
        t, r = self.draw_pair(ctx, batch.bsz)
        x_t = path.noised(x0, ctx.randn(tuple(x0.shape)), t)
        real = self.teacher_score(nets, batch, x_t, t, self.draw_guidance(ctx))
        end = r if config.r == "general" else None  # else r follows from t: it is not told

        def average(x: Tensor, t: Tensor) -> Tensor:
            return nets["student"](x, t, batch.cond, s=end).flow

        u = average(x_t, t)
        error = residual(config, ctx.step, average, real, u.detach(), r)
        size = per_sample(error**2)
        weight = residual_weight(config, flow_time(path, t), size)
        loss = surrogate(u, -expand(weight, error) * error)
        return Losses(loss, {"loss": loss.detach(), "residual": size.mean()})

    def draw_pair(self, ctx: Ctx, bsz: int) -> tuple[Tensor, Tensor]:
        """(t, r), each (B,) float64, by the laws of times and of r."""
        config, path = self.config, self.setting.path
        law = (config.time_mean, config.time_std)
        t = drawn_times(path, ctx.stratified(bsz), *law)
        if config.r == "zero":
            return t, torch.zeros_like(t)
        if config.r == "phases":
            t, edges = t.clamp_max(self.rollout.times[0]), self.edges.to(t.device)
            return t, edges[torch.searchsorted(edges, t - 1e-9) - 1]
        other = drawn_times(path, ctx.stratified(bsz), *law)
        same, late = ctx.rand(bsz) < config.same_share, torch.maximum(t, other)
        return late, torch.where(same, late, torch.minimum(t, other))

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """Of r phases its edges alone; else the student's grid, in any number of steps."""
        if self.config.r == "phases":
            return super().sampler(num_steps)
        times = self.rollout.times
        if num_steps not in (None, len(times)):
            times = self.config.uniform(self.setting, num_steps or 1)
        return SamplerSpec(times, self.config.sampler, tells_end=self.config.r == "general")
