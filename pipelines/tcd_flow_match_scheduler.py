"""Flow-matching scheduler with TCD's step: deterministic past the next sigma, then noise up to it.

    x_c = x + (c - sigma) v,  c = (1 - gamma) s;   x_s = r x_c + sqrt(s^2 - r^2 c^2) z
with v the network's velocity, s the next sigma (shifted already), r = (1 - s) / (1 - c) and z new
noise. gamma 0 is Euler's step, gamma 1 FlowMatchLCMScheduler's. An export that needs it carries
this file beside its config:
    pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
Source: Zheng et al. 2024, arXiv:2402.19159 (strategic stochastic sampling), whose own scheduler
serves VP tables alone. Needs diffusers and torch alone.
"""

# Shapes: B batch, then whatever the pipeline's latents have.

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class FlowMatchTCDScheduler(FlowMatchEulerDiscreteScheduler, SchedulerMixin):
    """FlowMatchEulerDiscreteScheduler with gamma, the stochasticity of its step, in its config.

    Args: gamma: 0 to 1; options: the stock scheduler's.
    """

    def __init__(self, gamma: float = 0.3, **options: Any) -> None:
        super().__init__(**options)
        self.register_to_config(gamma=gamma)

    # Diffusers passes the saved entries that stand in this signature.
    _stock = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__)
    __init__.__signature__ = _stock.replace(  # type: ignore[attr-defined]
        parameters=[
            *_stock.parameters.values(),
            inspect.Parameter("gamma", inspect.Parameter.KEYWORD_ONLY, default=0.3),
        ]
    )

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        *args: Any,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
        **options: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """x at the next sigma, shaped like sample (B, ...), in model_output's dtype.

        Errors: ValueError for times per token or stochastic_sampling.
        """
        if options.get("per_token_timesteps") is not None or self.config.stochastic_sampling:
            raise ValueError(
                "FlowMatchTCDScheduler: expected one time for all tokens and no "
                "stochastic_sampling, got one of them. Use the stock Euler scheduler."
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        sigma, s = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
        c = (1.0 - self.config.gamma) * s
        made = sample.to(torch.float32) + (c - sigma) * model_output.to(torch.float32)
        if s > c:
            r = (1.0 - s) / (1.0 - c)
            z = randn_tensor(made.shape, generator=generator, device=made.device, dtype=made.dtype)
            made = r * made + (s**2 - (r * c) ** 2).sqrt() * z
        self._step_index += 1
        made = made.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=made) if return_dict else (made,)
