"""Schedulers of rectified flow ++: steps from the first state, Heun's rule, or both.

In y = x / (alpha + sigma) and tau = sigma / (alpha + sigma) every Gaussian path is a straight one,
dy/dtau = eps - x0. On flow models that is the sample and its sigma; DDIM's tables are read so.
    anchored   y_s = x0(y_t) + (s / tau_1) (y_1 - x0(y_t)),  y_1 the state sampling began with
    Heun       each step but the last is taken anew, from the same y_t, with the mean of the
               velocities at its two ends: 2 N - 1 network calls for N steps
Up to two steps the anchored rule is Euler's, which leaves y_1 on the same line; from the third on
they part where the field is curved, and errors of y_t are not carried along. Use one of:
    pipe.scheduler = AnchoredFlowMatchScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = AnchoredDDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", clip_sample=False)
Source: Lee et al. 2024, arXiv:2405.20320, Sec. 4, and its released code. Needs diffusers and torch
alone.
"""

# Shapes: B batch, then whatever the pipeline's latents have.

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteSchedulerOutput,
)
from torch import Tensor


class _Rule:
    """The step in (y, tau), and what one call of sampling must remember."""

    anchored: ClassVar[bool] = False
    heun: ClassVar[bool] = False

    _anchor: tuple[Tensor, Tensor] | None = None  # (y_1, tau_1)
    _half: tuple[Tensor, Tensor] | None = None  # (y_t, velocity) of a step to be taken anew

    def forget(self) -> None:
        """Before a call of sampling."""
        self._anchor = self._half = None

    def listed(self, times: Tensor) -> Tensor:
        """What the network is told, (N,): later times twice with Heun's rule, ends and starts."""
        if not self.heun:
            return times
        return torch.cat([times[:1], times[1:].repeat_interleave(2)])

    def interval(self, index: int) -> tuple[int, int]:
        """Places of a step's two ends in `listed`, with the end of sampling after it."""
        start = index - 1 if self._half is not None else index
        return start, start + 1

    def advance(self, y: Tensor, slope: Tensor, tau: Tensor, following: Tensor) -> Tensor:
        """y (B, ...) at `following`, float32 in and out."""
        if self._anchor is None:
            self._anchor = y, tau
        if self._half is not None:
            y, slope = self._half[0], 0.5 * (self._half[1] + slope)
            self._half = None
        elif self.heun and following > 0:
            self._half = y, slope
        if not self.anchored:
            return y + (following - tau) * slope
        x0, (first, tau_1) = y - tau * slope, self._anchor
        return x0 + following / tau_1 * (first - x0)

    def check_start(self, index: int) -> None:
        """Errors: ValueError for a first step that is not the list's first (image to image)."""
        if self._anchor is None and index != 0:
            raise ValueError(
                f"{type(self).__name__}: expected sampling from pure noise, got a start at step "
                f"{index} of the list. Start at the first timestep."
            )


class _FlowMatch(_Rule, FlowMatchEulerDiscreteScheduler):
    """FlowMatchEulerDiscreteScheduler with another step; text to image alone."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """The stock grid, as `listed`. Pipelines look here whether sigmas may be given."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.forget()
        self.sigmas = torch.cat([self.listed(self.sigmas[:-1]), self.sigmas[-1:]])
        self.timesteps = self.listed(self.timesteps)
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

        Errors: ValueError for times per token, stochastic_sampling, or a later start.
        """
        if options.get("per_token_timesteps") is not None or self.config.stochastic_sampling:
            raise ValueError(
                f"{type(self).__name__}: expected one time for all tokens and no "
                "stochastic_sampling, got one of them. Use the stock Euler scheduler."
            )
        if self.step_index is None:
            self._init_step_index(timestep)
        self.check_start(self.step_index)
        tau, following = (self.sigmas[i] for i in self.interval(self.step_index))
        made = self.advance(sample.float(), model_output.float(), tau, following)
        made = made.to(model_output.dtype)
        self._step_index += 1
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=made) if return_dict else (made,)


class _DDIM(_Rule, DDIMScheduler):
    """DDIMScheduler with another step, without noise or clipping; text to image alone."""

    def set_timesteps(self, *args: Any, **options: Any) -> None:
        """The stock grid, as `listed`."""
        super().set_timesteps(*args, **options)
        self.forget()
        self._place = 0
        self.timesteps = self.listed(self.timesteps)

    def _coeffs(self, place: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) at a place of the list, (1, 0) after its end."""
        if place == len(self.timesteps):
            return like.new_ones(()), like.new_zeros(())
        abar = self.alphas_cumprod[self.timesteps[place].cpu()].to(like)
        return abar.sqrt(), (1.0 - abar).sqrt()

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *args: Any,
        return_dict: bool = True,
        **options: Any,
    ) -> DDIMSchedulerOutput | tuple[Tensor]:
        """x at the next timestep, shaped like sample (B, ...), in model_output's dtype.

        Errors: ValueError for a later start.
        """
        if self._anchor is None:
            self.check_start(int((self.timesteps == int(timestep)).nonzero()[0]))
        x, out = sample.float(), model_output.float()
        (alpha, sigma), (alpha_s, sigma_s) = (
            self._coeffs(place, x) for place in self.interval(self._place)
        )
        # The velocity is the output's, at its own time: in a second half the step's end.
        a, s = (alpha_s, sigma_s) if self._half is not None else (alpha, sigma)
        kind = self.config.prediction_type
        if kind == "epsilon":
            x0 = (x - s * out) / a
        else:
            x0 = a * x - s * out if kind == "v_prediction" else out
        slope = (x - a * x0) / s - x0
        tau, following = sigma / (alpha + sigma), sigma_s / (alpha_s + sigma_s)
        made = (alpha_s + sigma_s) * self.advance(x / (alpha + sigma), slope, tau, following)
        made = made.to(model_output.dtype)
        self._place += 1
        return DDIMSchedulerOutput(prev_sample=made) if return_dict else (made,)


class AnchoredFlowMatchScheduler(_FlowMatch):
    """Steps from the first state on flow models."""

    anchored = True


class HeunFlowMatchScheduler(_FlowMatch):
    """Heun's rule on the grid of FlowMatchEulerDiscreteScheduler, sent sigmas included."""

    heun = True


class AnchoredHeunFlowMatchScheduler(_FlowMatch):
    """Heun's rule from the first state."""

    anchored = heun = True


class AnchoredDDIMScheduler(_DDIM):
    """Steps from the first state on DDPM's tables."""

    anchored = True


class HeunDDIMScheduler(_DDIM):
    """Heun's rule in (y, tau) on DDPM's tables."""

    heun = True


class AnchoredHeunDDIMScheduler(_DDIM):
    """Heun's rule from the first state, on DDPM's tables."""

    anchored = heun = True
