"""Causal video students in stock Diffusers: SkyReelsV2's diffusion-forcing pipeline holds them.

Its transformer has Wan's weights by their names and a block-causal mask (num_frame_per_block).
Called with ar_step = N and causal_block_size = the chunk, its loop denoises one chunk in N steps
behind the clean ones before it: what the student was trained for, without a cache, so the past is
computed anew in every call. UniPC of order 1 without its corrector is the deterministic step, but
on times up to a thousandth below the trained ones, and the network is told whole numbers (937 of
937.5). An export is compared with the sampler on these (`as_played`).
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
from diffusers import (
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.path import FlowPath, NoisePath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.export.flow_grid import shift_of_grid
from stepdistill.export.schedulers import StockSampler
from stepdistill.families.family import Family

_OFF = 2e-3  # of a time: its grid ends one table entry above 0


def causal_sampler(family: Family, path: NoisePath, spec: SamplerSpec) -> StockSampler:
    """The stock sampler of a causal student. Errors: ValueError for other than a deterministic
    sampler on a (shifted) uniform grid, the only one that the pipeline takes."""
    frames = family.sample_shape()[1]
    if spec.chunk == 1 and frames > 1:
        raise ValueError(
            "export: expected chunks of two latent frames or more, got 1: the stock transformer "
            "masks no chunk of a single frame. Train with --method_config.chunk 3."
        )
    total, num = family.pipeline.scheduler.config.num_train_timesteps, spec.num_steps
    shift = shift_of_grid(spec.times)
    made = UniPCMultistepScheduler(
        num_train_timesteps=total,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        solver_order=1,
        disable_corrector=list(range(num)),
    )
    made.set_timesteps(num)
    if spec.kind != "ode" or not np.allclose(made.sigmas[:-1], spec.times, atol=_OFF):
        raise ValueError(
            f"export: expected a causal student of sampler ode on a shifted uniform grid, the one "
            f"that {SkyReelsV2DiffusionForcingPipeline.__name__} can take, got {spec.kind} at "
            f"{spec.times}. Train with --method_config.sampler ode."
        )
    call = {
        **family.call_extras,
        "base_num_frames": family.call_extras["num_frames"],
        "ar_step": num if frames > spec.chunk else 0,
        "causal_block_size": spec.chunk,
    }
    return StockSampler(made, tuple(made.timesteps.tolist()), call)


class _WholeTimes(FlowPath):
    """A flow path whose network is told whole numbers."""

    def model_time(self, t: Tensor) -> Tensor:
        return super().model_time(t).float().floor().double()


def as_played(
    denoiser: Denoiser, spec: SamplerSpec, sampler: StockSampler
) -> tuple[Denoiser, SamplerSpec]:
    """(denoiser, sampler) at the times of the stock loop, to compare its images with."""
    stepped, times = copy.copy(denoiser), tuple(sampler.scheduler.sigmas[:-1].tolist())
    stepped.path = _WholeTimes(sampler.scheduler.config.num_train_timesteps)
    return stepped, replace(spec, times=times, trained_times=None)


def causal_pipeline(family: Family, net: Any, sampler: StockSampler, chunk: int) -> Any:
    """The stock pipeline around the student's weights."""
    config = {key: value for key, value in net.config.items() if not key.startswith("_")}
    stock = SkyReelsV2Transformer3DModel.from_config({**config, "num_frame_per_block": chunk})
    stock.load_state_dict(net.state_dict())
    parts = {name: getattr(family.pipeline, name) for name in ("tokenizer", "text_encoder", "vae")}
    return SkyReelsV2DiffusionForcingPipeline(
        **parts,
        transformer=stock.to(net.device, net.dtype).eval().requires_grad_(False),
        scheduler=sampler.scheduler,
    )
