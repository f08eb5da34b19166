"""Options of consistency distillation."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from stepdistill.core.method import MethodConfig
from stepdistill.losses.regression import DistanceName
from stepdistill.losses.rewards import LPIPSOptions
from stepdistill.methods.grid import Boundary


class GridGrowth(MethodConfig):
    """CT's schedule: a coarse grid first (low variance), a fine one later (low bias).

    N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 points at step k; s1 is num_grid. A
    VP table takes the nearest divisor of its length below N(k) - 1 intervals.
    Source: Song et al. 2023, arXiv:2303.01469, Sec. 5 and Appendix C.
    """

    start: int = Field(default=2, ge=2)
    """s0: grid points at the first student update."""
    steps: int = Field(ge=1)
    """K: student updates until the grid has num_grid intervals; it stays so afterwards."""

    def intervals(self, step: int, num_grid: int) -> int:
        """N(k) - 1: how many pairs of neighbours student update `step` draws from."""
        share = min(step / self.steps, 1.0)
        root = math.sqrt(share * ((num_grid + 1) ** 2 - self.start**2) + self.start**2)
        return math.ceil(round(root - 1.0, 9))


class ConsistencyConfig(MethodConfig):
    num_grid: int = Field(default=50, ge=1)
    """Points of the solver grid; one teacher step spans 1 / num_grid. Divides a VP table."""
    solver: Literal["ddim", "heun", "data"] = "ddim"
    """Teacher step: ddim (Euler on flow), heun (2nd order), data (no teacher: CT, Euler on x0)."""
    boundary: Boundary = "auto"
    """How f(x, end) = x: lcm skip/out (VP), cd skip/out (VE), none (end 0, where x0 is x); auto is
    lcm on VP, cd on VE, none on flow. The sampler applies the same."""
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
    loss: DistanceName | Literal["lpips"] = "l2"
    """Distance: l2, l1 or pseudo-Huber of latents, or lpips of decoded images."""
    lpips: LPIPSOptions = LPIPSOptions(resize=224, resize_below=256, pooling="avg")
    """Options of loss lpips, as consistency_models has them."""
    huber_c: float = Field(default=1e-3, gt=0)
    """c of the pseudo-Huber distance."""
    growth: GridGrowth | None = None
    """Let the grid grow to num_grid while training without a teacher (CT); none keeps it."""
    num_steps: int = Field(default=4, ge=1)
    """Sampling steps where none are asked for."""

    @model_validator(mode="after")
    def _check(self) -> ConsistencyConfig:
        low, high = self.guidance_range
        if not 0 <= low <= high:
            raise ValueError(f"guidance_range: expected 0 <= low <= high, got {(low, high)}.")
        if self.growth is not None and self.growth.start > self.num_grid:
            raise ValueError(
                f"growth.start: expected at most num_grid = {self.num_grid}, got "
                f"{self.growth.start}."
            )
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

    def target_decay(self, step: int) -> float:
        """Decay of the EMA target after student update `step`: exp(s0 log mu0 / intervals), CT.

        The coarser the grid, the faster the target follows. consistency_models divides by the
        intervals, so that mu(0) = mu0^s0; the paper by the points N(k), one more: mu(0) = mu0.
        """
        if self.growth is None or self.ema_decay == 0.0:
            return self.ema_decay
        intervals = self.growth.intervals(step, self.num_grid)
        return math.exp(self.growth.start * math.log(self.ema_decay) / intervals)
