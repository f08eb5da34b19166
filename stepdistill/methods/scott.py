"""SCott: consistency distillation through the teacher's SDE, with an adversarial term.

The target's x_s is reached by several steps of the teacher's SDE with fresh noise of strength eta
(core/solvers.py, stochastic_step) in place of one step of its ODE; a head on the frozen teacher's
features tells the student's x0, noised, from images. eta = 0 in one step without a GAN is
`consistency`, bit for bit.
Noise has its price: a regression on x0 of random x_s learns their mean. On N(mu, std^2) data the
fixed point has the slope of the flow map at eta = 0, and at eta = 1 that of the blurry E[x0 | x_t].
Source: Liu et al. 2024, arXiv:2403.01505. No code was released.
Differs from the paper: DDIM's noise in place of ER-SDE's; the head reads features of the frozen
teacher at a noise level of its own, where the paper adapts half a UNet by LoRA.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), K heads. t: (B,).

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import Field
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Nets, Phase, Role, ScorerSpec, Setting
from stepdistill.core.path import VPPath
from stepdistill.core.recipe import Recipe
from stepdistill.core.solvers import Solver, stochastic_step
from stepdistill.core.types import Batch, Losses
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.consistency_config import ConsistencyConfig
from stepdistill.methods.digits import SOON, jumps
from stepdistill.methods.judge import Judge, JudgeGAN
from stepdistill.methods.rollout import Sample


class SCottGAN(JudgeGAN):
    """Off with weight_g 0. Needs real images."""

    weight_g: float = Field(default=0.4, ge=0)
    """Weight of the generator loss beside the consistency loss; 0 turns the GAN off."""


class SCottConfig(ConsistencyConfig):
    """Options of scott, besides those of consistency."""

    solver: Literal["ddim"] = "ddim"
    """Teacher step: DDIM with noise (Euler's on flow paths, where eta is 0)."""
    eta: float = Field(default=0.3, ge=0, le=1)
    """Strength of the noise in the teacher's steps: 0 is its ODE, 1 its reverse SDE."""
    solver_steps: int = Field(default=3, ge=1)
    """Teacher steps from t to s, equal parts of it."""
    num_grid: int = Field(default=40, ge=1)
    """Points of the solver grid, 1 / num_grid from t to s. Divides a VP table."""
    num_steps: int = Field(default=2, ge=1)
    """Sampling steps where none are asked for."""
    gan: SCottGAN = SCottGAN()
    """Adversarial term."""


class SCott(Consistency):
    """Self-consistency along the teacher's SDE, and a head that tells its x0 from images."""

    name = "scott"
    paper = "Liu et al. 2024, arXiv:2403.01505"
    Config = SCottConfig
    status = "trained on real data here"
    aliases = {"stochastic_consistency": {}}
    steps = (2, 4)
    # Few updates: long jumps, and a head that does not rule them: at 0.4 two steps on the emoji had
    # 10.2 (seed 0), at 0.05 7.6.
    digits = (Recipe("scott", jumps(1200, **SOON, num_grid=10, gan={"weight_g": 0.05})),)
    config: SCottConfig

    def __init__(self, config: SCottConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.judge = Judge(config.gan, setting.path, self.draw_times)
        if isinstance(setting.path, VPPath):
            entries = setting.path.num_steps // config.num_grid
            if config.shrink is None and config.solver_steps > entries:
                raise ValueError(
                    f"solver_steps: expected at most {entries}, the table entries from t to s, got "
                    f"{config.solver_steps}. Set a smaller num_grid."
                )

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | self.judge.needs

    def roles(self) -> dict[str, Role]:
        return {**super().roles(), **self.config.gan.roles()}

    def scorers(self) -> dict[str, ScorerSpec]:
        return {**super().scorers(), **self.config.gan.scorers()}

    def phases(self, step: int) -> Sequence[Phase]:
        """The student's update, then the head's on the same x0."""
        return self.judge.phases(Phase("student", self.loss, ("student",), reads_real=False))

    def solver(self, ctx: Ctx) -> Solver:
        steps, eta = self.config.solver_steps, self.config.eta
        return partial(stochastic_step, eta=eta, num_steps=steps, randn=ctx.randn)

    def draw_times(self, ctx: Ctx, bsz: int) -> Tensor:
        """(B,) float64 noise levels that the head judges at: any of the grid."""
        return self.grid.pair(ctx.randint(0, len(self.grid.starts), bsz))[0]

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """The consistency loss, and what the head thinks of the student's x0."""
        losses, x0 = self.compare(nets, batch, ctx)
        return self.judge.plus(losses, nets, ctx, Sample(x0, batch.cond))
