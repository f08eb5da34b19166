"""Stable Audio's scheduler with the ODE's first-order step, to compare with its stock call.

The stock one takes the SDE's steps alone, from noise of torchsde's.
"""

# Shapes: B batch, C channels, L length.

from __future__ import annotations

from typing import Any

from diffusers.schedulers.scheduling_cosine_dpmsolver_multistep import (
    CosineDPMSolverMultistepScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor


class TrigODEScheduler(CosineDPMSolverMultistepScheduler):  # type: ignore[misc]
    """Its own grid, times and preconditioning; latents as on TrigPath, x / sqrt(1 + sigma^2)."""

    init_noise_sigma = 1.0

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None
    ) -> SchedulerOutput:
        """x' (B, C, L) with x0 + sigma' / sigma (x - x0), the DDIM step."""
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, later = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        x = sample * (1 + sigma**2).sqrt()
        x0 = self.convert_model_output(model_output, sample=x)
        self._step_index += 1
        return SchedulerOutput(prev_sample=(x0 + later / sigma * (x - x0)) / (1 + later**2).sqrt())
