"""Flow-matching schedulers of rectified flow ++: steps from the first noise, and Heun's rule.

    anchored   x_s = (1 - s) x0(x_t) + s z,  z the noise sampling began with
    Heun       each step but the last is taken anew, from the same x_t, with the mean of the
               velocities at its two ends: 2 N - 1 network calls for N steps
Up to two steps the anchored rule is Euler's, which leaves z on the same line; from the third on
they part where the field is curved, and errors of x_t are not carried along. Use one of:
    pipe.scheduler = AnchoredFlowMatchScheduler.from_config(pipe.scheduler.config)
Source: Lee et al. 2024, arXiv:2405.20320, Sec. 4, and its released code. Needs diffusers and torch
alone.
"""

# Shapes: B batch, then whatever the pipeline's latents have.

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor


class AnchoredFlowMatchScheduler(FlowMatchEulerDiscreteScheduler):
    """FlowMatchEulerDiscreteScheduler whose step mixes x0 with the first noise.

    Sampling must start from pure noise (sigma 1), as text to image does: from a later start (image
    to image) the first sample is no noise, and the step raises ValueError.
    """

    anchored: ClassVar[bool] = True
    heun: ClassVar[bool] = False

    _anchor: Tensor | None = None
    _half: tuple[Tensor, Tensor] | None = None  # (x_t, velocity) of a step to be taken anew

    def set_timesteps(self, *args: Any, **options: Any) -> None:
        """The stock grid, inner times twice with Heun's rule; forgets the last call's noise."""
        super().set_timesteps(*args, **options)
        self._anchor = self._half = None
        if self.heun:
            twice = [self.sigmas[:1], self.sigmas[1:-1].repeat_interleave(2), self.sigmas[-1:]]
            self.sigmas = torch.cat(twice)
            inner = self.timesteps[1:].repeat_interleave(2)
            self.timesteps = torch.cat([self.timesteps[:1], inner])
            self.num_inference_steps = len(self.timesteps)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is, for loops made for schedulers that scale it."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *args: Any,
        return_dict: bool = True,
        **options: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """x at the next sigma, shaped like sample (B, ...), in model_output's dtype.

        Errors: ValueError for times per token, stochastic_sampling, or a start below sigma 1.
        """
        if options.get("per_token_timesteps") is not None or self.config.stochastic_sampling:
            raise ValueError(
                f"{type(self).__name__}: expected one time for all tokens and no "
                "stochastic_sampling, got one of them. Use the stock Euler scheduler."
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        # In the second half of a step both sigmas are those of the first.
        index = self.step_index if self._half is None else self.step_index - 1
        sigma, following = self.sigmas[index], self.sigmas[index + 1]
        if self._anchor is None:
            if abs(float(sigma) - 1.0) > 1e-6:
                raise ValueError(
                    f"{type(self).__name__}: expected sampling from pure noise (sigma 1), got "
                    f"sigma {float(sigma):g}. Start at the first timestep."
                )
            self._anchor = sample.to(torch.float32)
        x, slope = sample.to(torch.float32), model_output.to(torch.float32)
        if self._half is not None:
            x, slope = self._half[0], 0.5 * (self._half[1] + slope)
            self._half = None
        elif self.heun and following > 0:
            self._half = x, slope
        if self.anchored:
            x0 = x - sigma * slope
            made = (1.0 - following) * x0 + following * self._anchor
        else:
            made = x + (following - sigma) * slope
        made = made.to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=made) if return_dict else (made,)


class HeunFlowMatchScheduler(AnchoredFlowMatchScheduler):
    """Heun's rule on the grid of FlowMatchEulerDiscreteScheduler, sent sigmas included."""

    anchored = False
    heun = True


class AnchoredHeunFlowMatchScheduler(AnchoredFlowMatchScheduler):
    """Heun's rule from the first noise."""

    heun = True
