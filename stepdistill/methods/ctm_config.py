"""Options of ctm."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from stepdistill.losses.rewards import LPIPSOptions
from stepdistill.methods.trajectory_config import AnyEndConfig


class CTMConfig(AnyEndConfig):
    """Options of ctm."""

    target: Literal["ema"] = "ema"
    """Target network: EMA of the student, through which gradients pass to the student's jump."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay of the EMA target after every student step."""
    solver: Literal["ddim", "heun"] = "ddim"
    """Step from t towards u: ddim (Euler on flow) or heun (2nd order, two calls)."""
    solver_steps: int = Field(default=8, ge=1)
    """Most grid intervals H from t to u: h of them, P(h) proportional to h, one h a batch. num_grid
    reaches s itself at times (global consistency), 1 compares neighbours (local)."""
    bootstrap: bool = False
    """Solve by the target's own denoiser G(x, t, t), not the teacher: a model of its own from data.
    Wants end_input and denoising."""
    lpips: LPIPSOptions | None = None
    """Compare decoded images by LPIPS in place of `loss`; {} has its defaults."""
    denoising: float = Field(default=0.0, ge=0)
    """Weight of the denoising (score matching) loss of G(x, t, t); 0 has none. Wants end_input."""
    denoising_mean: float = -1.2
    """Mean of log(sigma / alpha) in that loss, which is normal."""
    denoising_std: float = Field(default=1.2, gt=0)
    """Standard deviation of the same."""

    @model_validator(mode="after")
    def _check(self) -> CTMConfig:
        for name in ("solver_steps", "num_steps"):
            value = getattr(self, name)
            if value is not None and value > self.num_grid:
                raise ValueError(
                    f"{name}: expected at most num_grid = {self.num_grid}, got {value}."
                )
        if self.denoising and not self.end_input:
            raise ValueError(
                f"denoising: expected 0 without end_input, got {self.denoising:g}: one answer for "
                "all ends would be drawn from its jumps to the mean image. Set end_input: true, "
                "with a full student."
            )
        if self.denoising and self.guidance_range != (1.0, 1.0):
            raise ValueError(
                f"denoising: expected guidance_range (1, 1) beside it (data are not guided), got "
                f"{self.guidance_range}. Set denoising: 0, or guidance_range: [1, 1]."
            )
        if self.bootstrap and not self.denoising:
            raise ValueError(
                "bootstrap: expected denoising above 0 beside it (all else comes from the student "
                "itself), got 0. Set denoising, say to 1."
            )
        return self

    def intervals(self, u: float) -> int:
        """h in 1 to solver_steps with P(h) proportional to h, from u ~ U[0, 1)."""
        count = self.solver_steps
        h = math.ceil(0.5 * (math.sqrt(1.0 + 4.0 * u * count * (count + 1)) - 1.0))
        return min(max(h, 1), count)
