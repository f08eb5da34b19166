"""Samples images through a stock pipeline's own __call__, counting its network calls."""

# N images

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from .metrics import Samples


class PipelineSampler:
    """Calls a loaded pipeline at a fixed number of steps; a `metrics.Sampler`.

    Args: guidance_scale in Diffusers' convention; 1 means none. options: more of its call's.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        num_inference_steps: int,
        guidance_scale: float = 1,
        **options: Any,
    ) -> None:
        self.pipeline = pipeline
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.options = options
        pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], seed: int) -> Samples:
        rows = 0

        def count(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            nonlocal rows
            rows += len(inputs[0])

        hook = self.pipeline.unet.register_forward_pre_hook(count)
        start = time.perf_counter()
        try:
            images = self.pipeline(
                list(prompts),
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                generator=torch.Generator().manual_seed(seed),
                output_type="np",
                **self.options,
            ).images  # (N, 8, 8, 1) in [0, 1]
        finally:
            hook.remove()
        seconds = time.perf_counter() - start
        tensor = torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1
        return Samples(tensor, seconds, rows / len(prompts))
