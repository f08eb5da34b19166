"""Consistency distillation (CD) and latent consistency models (LCM, LCM-LoRA).

f(x_t, t) jumps from any point of the teacher's trajectory to its clean end. With x_s one guided
teacher step from x_t along a grid:  loss = d( f_student(x_t, t), stopgrad f_target(x_s, s) ).
Sources: Song et al. 2023, arXiv:2303.01469; Luo et al. 2023, arXiv:2310.04378 and 2311.05556.
Differs from the papers: no LPIPS; guidance is g of null + g (cond - null), where LCM's w = g - 1.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Method, MethodConfig, Nets, Phase, Role, Setting
from stepdistill.core.solvers import SamplerSpec, teacher_step
from stepdistill.core.types import Batch, Losses
from stepdistill.losses.regression import DistanceName, distance, weighted_mean
from stepdistill.methods.grid import Boundary, SolverGrid, heun_step


class ConsistencyConfig(MethodConfig):
    num_grid: int = Field(default=50, ge=1)
    """Points of the solver grid; one teacher step spans 1 / num_grid. Divides a VP table."""
    solver: Literal["ddim", "heun", "data"] = "ddim"
    """Teacher step: ddim (Euler on flow), heun (2nd order), data (no teacher: CT, Euler on x0)."""
    boundary: Boundary = "auto"
    """How f(x, end) = x: lcm skip/out (VP), cd skip/out (VE), none (end 0, where x0 is x); auto is
    lcm on VP, cd on VE, none on flow. The sampler applies lcm's; cd's differ from x0 by less than
    sigma_min / sigma there and are left out."""
    timestep_scaling: float = Field(default=10.0, gt=0)
    """Scale of the table index in LCM's skip/out coefficients."""
    guidance_range: tuple[float, float] = (4.0, 16.0)
    """Teacher guidance g, uniform per sample; equal ends fix it, (1, 1) turns it off. g = w + 1."""
    embed_guidance: bool = False
    """Tell the student w = g - 1 (full students of families with a guidance embedding only)."""
    inference_guidance: float = 8.5
    """The g whose w = g - 1 the sampler tells the student; read with embed_guidance alone."""
    target: Literal["ema", "self"] = "ema"
    """Target network: EMA of the student, or the student itself without gradients."""
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the EMA target after every student step."""
    loss: DistanceName = "l2"
    """Elementwise distance: l2, l1 or pseudo-Huber."""
    huber_c: float = Field(default=1e-3, gt=0)
    """c of the pseudo-Huber distance."""
    num_steps: int = Field(default=4, ge=1)
    """Sampling steps where none are asked for."""

    @model_validator(mode="after")
    def _check(self) -> ConsistencyConfig:
        low, high = self.guidance_range
        if not 0 <= low <= high:
            raise ValueError(f"guidance_range: expected 0 <= low <= high, got {(low, high)}.")
        if self.num_steps > self.num_grid:
            raise ValueError(
                f"num_steps: expected at most num_grid = {self.num_grid}, got {self.num_steps}."
            )
        if self.embed_guidance and self.solver == "data":
            raise ValueError("embed_guidance: expected a guided solver, got 'data'. Use 'ddim'.")
        if self.embed_guidance and not low <= self.inference_guidance <= high:
            raise ValueError(
                f"inference_guidance: expected a value inside guidance_range {(low, high)}, got "
                f"{self.inference_guidance}. The embedding is trained on no other."
            )
        return self


class Consistency(Method[ConsistencyConfig]):
    """Self-consistency along the guided teacher's trajectory, over a fixed grid of times."""

    name = "consistency"
    paper = "Song et al. 2023, arXiv:2303.01469; Luo et al. 2023, arXiv:2310.04378"
    Config = ConsistencyConfig

    def __init__(self, config: ConsistencyConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.grid = SolverGrid(setting, config.num_grid, config.boundary, config.timestep_scaling)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"x0", "cond"})

    def roles(self) -> dict[str, Role]:
        extra = ("w",) if self.config.embed_guidance else ()
        roles = {"student": Role(train=True, extra_inputs=extra)}
        if self.config.solver != "data":
            roles["teacher"] = Role()
        if self.config.target == "ema":
            roles["target"] = Role(ema_of="student", extra_inputs=extra)
        return roles

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("student", self.loss, trains=("student",)),)

    def after(self, nets: Nets, step: int) -> None:
        if self.config.target == "ema":
            nets.ema_update("target", self.config.ema_decay)

    def draw_guidance(self, ctx: Ctx, bsz: int) -> float | Tensor:
        """g for the teacher: (B,) float64 uniform on guidance_range, or the fixed number."""
        low, high = self.config.guidance_range
        return low if low == high else low + (high - low) * ctx.rand(bsz)

    def solve(
        self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, s: Tensor, g: float | Tensor
    ) -> Tensor:
        """x_s (B, C, *S): the cleaner neighbour of x_t on the (guided) teacher's trajectory."""
        if self.config.solver == "data":
            assert batch.x0 is not None
            return self.setting.path.step(batch.x0, x_t, t, s)
        step = heun_step if self.config.solver == "heun" else teacher_step
        return step(nets["teacher"], x_t, t, s, batch.cond, batch.null, g)

    def loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        """d( f_student(x_t, t), stopgrad f_target(x_s, s) ), every grid interval alike."""
        config, x0 = self.config, batch.x0
        assert x0 is not None, "the trainer checks `needs`"
        t, s = self.grid.pair(ctx.randint(0, config.num_grid, batch.bsz))
        g = self.draw_guidance(ctx, batch.bsz)
        w = None
        if config.embed_guidance:
            w = torch.as_tensor(g, dtype=torch.float32, device=t.device).expand(batch.bsz) - 1.0
        x_t = self.setting.path.add_noise(x0, ctx.randn(tuple(x0.shape)), t)
        estimate = self.grid.blend(nets["student"](x_t, t, batch.cond, w=w))
        x_s = self.solve(nets, batch, x_t, t, s, g)
        with torch.no_grad():
            target = self.grid.blend(
                nets["target" if config.target == "ema" else "student"](x_s, s, batch.cond, w=w)
            )
        total = weighted_mean(distance(config.loss, estimate, target, config.huber_c))
        return Losses(total, {"loss": total.detach()})

    def sampler(self, num_steps: int | None = None) -> SamplerSpec:
        """x0 then fresh noise, at the times the stock LCMScheduler visits of this grid."""
        embedded = self.config.embed_guidance
        return SamplerSpec(
            self.grid.visit(self.config.num_steps if num_steps is None else num_steps),
            "renoise",
            trained_times=tuple(self.grid.starts.flip(0).tolist()),
            w=self.config.inference_guidance - 1.0 if embedded else None,
            boundary_scale=self.grid.scale,
        )
