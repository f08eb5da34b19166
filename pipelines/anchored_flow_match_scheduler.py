"""Flow-matching scheduler that keeps the first noise: rectified flow ++'s sampler.

    x_s = (1 - s) x0(x_t) + s z,  z the noise sampling began with
Up to two steps this is Euler, which leaves z on the same line; from the third on they part where
the field is curved, and errors of x_t are not carried along. Use:
    pipe.scheduler = AnchoredFlowMatchScheduler.from_config(pipe.scheduler.config)
Source: Lee et al. 2024, arXiv:2405.20320, Sec. 4. Needs diffusers and torch alone.
"""

# Shapes: B batch, then whatever the pipeline's latents have.

from __future__ import annotations

from typing import Any

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

    _anchor: Tensor | None = None

    def set_timesteps(self, *args: Any, **options: Any) -> None:
        """The stock grid; forgets the noise of the last call."""
        super().set_timesteps(*args, **options)
        self._anchor = None

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
                "AnchoredFlowMatchScheduler: expected one time for all tokens and no "
                "stochastic_sampling, got one of them. Use the stock Euler scheduler."
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, following = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        if self._anchor is None:
            if abs(float(sigma) - 1.0) > 1e-6:
                raise ValueError(
                    "AnchoredFlowMatchScheduler: expected sampling from pure noise (sigma 1), got "
                    f"sigma {float(sigma):g}. Start at the first timestep."
                )
            self._anchor = sample.to(torch.float32)
        x0 = sample.to(torch.float32) - sigma * model_output.to(torch.float32)
        made = ((1.0 - following) * x0 + following * self._anchor).to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=made) if return_dict else (made,)
