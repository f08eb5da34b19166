"""Scale distillation: a super-resolution teacher at an easier factor teaches a harder one.

With l_N the image at 1 / N of its size, x_t = alpha x0 + sigma eps of the full image:
    w(t) | x0_student(x_t, t, l_N) - sg x0_teacher(x_t, t, l_{N/2}) |^2,
both of the same x_t and t. Where l_N is what the teacher saw, and the student the teacher, it is 0.
Chained: the first teacher learns x0 itself (target: images), its student at twice the factor is the
next one's teacher. What the teacher knows and l_N does not tell is so averaged in steps, and by how
noisy x_t is, where x0 would be one-to-many at once.
Source: Noroozi et al. 2024 (YONOS-SR), arXiv:2401.17258; no code was released.
Differs from the paper, which leaves them open to us: w, the law of t, and the teacher's guidance.
"""

# Shapes: B batch, C channels, *S spatial. t: (B,).

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import FIELDS, Method, MethodConfig, Nets, Phase, Role, Setting
from stepdistill.core.options import Guidance
from stepdistill.core.path import full
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import grid_times, snapped_grid
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.regression import squared_error, weighted_mean
from stepdistill.methods.grid import LOWEST


class ScaleDistillConfig(MethodConfig):
    """Options of scale_distill; the factors are the data's (--data.degradation)."""

    target: Literal["teacher", "images"] = "teacher"
    """What the student is to answer: the teacher's x0 of the easier image, or the data themselves,
    by which a chain begins (and which is direct training)."""
    num_steps: int = Field(default=1, ge=1)
    """Calls that the student is meant for; it is trained at all times, and takes any number."""
    grid_share: float = Field(default=0.5, ge=0, le=1)
    """Share of the samples at the times of those calls; the rest is uniform over all."""
    weight: Literal["none", "v"] = "none"
    """w(t): 1, or 1 / sigma^2, the error of v or flow."""
    guidance: Guidance = 1.0
    """Guidance of the teacher, folded into its student; the stock upscaler's own is 9."""


class ScaleDistill(Method[ScaleDistillConfig]):
    """One step of super-resolution, distilled across factors."""

    name = "scale_distill"
    paper = "Noroozi et al. 2024, arXiv:2401.17258"
    Config = ScaleDistillConfig
    guidance_options = ("guidance",)
    status = "trained on real data here"
    aliases = {"yonos": {}, "yonos_sr": {}}
    trainer = "SuperResolutionTrainer"
    data = "lowres"
    needs_image = True
    one_student = True

    def __init__(self, config: ScaleDistillConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        if config.target == "images" and config.changed("guidance"):
            warnings.warn(
                "guidance has no effect with target images: no teacher is called. Leave it out.",
                stacklevel=3,
            )
        self.times = snapped_grid(setting.path, config.num_steps, setting.shift)

    @property
    def teacher_guidance(self) -> float:
        """See Method.teacher_guidance; the images are of no guidance."""
        return self.config.guidance if self.config.target == "teacher" else 1.0

    @property
    def needs(self) -> frozenset[str]:
        return FIELDS["lowres" if self.config.target == "teacher" else "images"]

    def roles(self) -> dict[str, Role]:
        teacher = {"teacher": Role()} if self.config.target == "teacher" else {}
        return {**teacher, "student": Role(train=True)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.loss, ("student",), reads_real=False),)

    def draw_times(self, ctx: Ctx, bsz: int) -> Tensor:
        """(B,) times that the teacher knows: a share on the student's grid."""
        anywhere = self.setting.path.snap(ctx.stratified(bsz).clamp_min(LOWEST))
        visited, _ = grid_times(ctx.rand(bsz), self.times)
        return torch.where(ctx.rand(bsz) < self.config.grid_share, visited, anywhere)

    def target(self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, C, *S) x0 that the student is to answer, without gradient."""
        assert batch.x0 is not None, "the trainer checks `needs`"
        if self.config.target == "images":
            return full(batch.x0)
        assert batch.easier is not None, "as above"
        cond, null = batch.easier
        with torch.no_grad():
            return nets["teacher"](x_t, t, cond, null, self.config.guidance).x0

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """w(t) | x0_student(l_N) - target |^2 at one x_t and t of both."""
        assert batch.x0 is not None, "the trainer checks `needs`"
        path = self.setting.path
        eps, t = ctx.randn(tuple(batch.x0.shape)), self.draw_times(ctx, batch.bsz)
        x_t = path.noised(batch.x0, eps, t)
        target = self.target(nets, batch, x_t, t)
        error = squared_error(nets["student"](x_t, t, batch.cond).x0, target)
        weight = path.coeffs(t)[1] ** -2 if self.config.weight == "v" else None
        total = weighted_mean(error, weight)
        return Losses(total, {"loss": total.detach()})

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """Deterministic steps from pure noise, of any number: "trailing" on a table."""
        if num_steps in (None, self.config.num_steps):
            return SamplerSpec(self.times, "ode")
        return SamplerSpec(
            snapped_grid(self.setting.path, num_steps or 1, self.setting.shift), "ode"
        )
