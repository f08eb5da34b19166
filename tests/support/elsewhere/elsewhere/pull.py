"""A method of somebody else's: the student's answer to pure noise is pulled to the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from stepdistill.core.context import Ctx
from stepdistill.core.method import Method, MethodConfig, Nets, Phase, Role
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Batch, Losses


class PullConfig(MethodConfig):
    num_steps: int = Field(default=1, ge=1)
    """Sampling steps."""


class Pull(Method[PullConfig]):
    """Regression on the teacher's own answer, from prompts alone."""

    name = "pull"
    paper = "somebody else's"
    Config = PullConfig
    aliases: ClassVar = {"pull_twice": {"num_steps": 2}}
    steps = (1, 2)

    def roles(self) -> dict[str, Role]:
        return {"teacher": Role(), "student": Role(train=True)}

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.loss, ("student",)),)

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        path, t = self.setting.path, ctx.times(1.0, batch.bsz)
        noise = path.prior(ctx.randn((batch.bsz, *batch.shape)))
        with torch.no_grad():
            wanted = 0.5 * nets["teacher"](noise, t, batch.cond).x0
        error = (nets["student"](noise, t, batch.cond).x0 - wanted).square().mean()
        return Losses(error, {"pull": error.detach()})

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        times = uniform_grid(num_steps or self.config.num_steps, self.setting.shift)
        return SamplerSpec(times, "ode", trained_times=times)
