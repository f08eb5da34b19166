"""Samples images through a stock pipeline's own __call__; counts its network calls and its time."""

# N images, F frames, C channels, H, W in px

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill.families.registry import family_for

from .pictured import Pictured


@dataclass(frozen=True)
class Samples:
    """What a sampler made from one noise seed.

    images (N, C, H, W) in [-1, 1], or videos (N, F, C, H, W), in the order of the prompts; seconds
    for all of them; network_calls: denoiser evaluations of each, a guided step counting twice.
    """

    images: Tensor
    seconds: float
    network_calls: float


class PipelineSampler:
    """Calls a loaded pipeline as `call` says: num_inference_steps, guidance_scale, ...

    Args: conditioning: "prompt", "label" or "none", what the pipeline is told for each image.
    """

    def __init__(
        self, pipeline: Any, call: Mapping[str, Any], conditioning: str = "prompt"
    ) -> None:
        self.pipeline, self.call, self.conditioning = pipeline, dict(call), conditioning
        family = family_for(type(pipeline).__name__)
        named = family.nets_in(pipeline.config)
        self.nets: list[nn.Module] = [getattr(pipeline, name) for name in named]
        self.output, self.image_argument = family.output, family.image_argument
        pipeline.set_progress_bar_config(disable=True)

    def __call__(self, prompts: Sequence[Any], seed: int) -> Samples:
        """One image for each prompt, all from one generator."""
        return self.draw(prompts, torch.Generator().manual_seed(seed))

    def in_parts(self, prompts: Sequence[Any], seed: int, rows: int = 100) -> Samples:
        """As a call, `rows` images at a time."""
        generator = torch.Generator().manual_seed(seed)
        parts = [prompts[first : first + rows] for first in range(0, len(prompts), rows)]
        made = [self.draw(part, generator) for part in parts]
        images, seconds = torch.cat([one.images for one in made]), sum(one.seconds for one in made)
        return Samples(images, seconds, made[0].network_calls)

    @torch.no_grad()
    def draw(
        self, prompts: Sequence[Any], generator: torch.Generator | list[torch.Generator]
    ) -> Samples:
        """One image for each prompt (label, None, Pictured). Args: generator: one, or one each.

        Those with pictures are made one by one: stock calls take those of one prompt.
        """
        if prompts and isinstance(prompts[0], Pictured) and len(prompts) > 1:
            each = generator if isinstance(generator, list) else [generator] * len(prompts)
            made = [self.draw([p], [one]) for p, one in zip(prompts, each, strict=True)]
            images = torch.cat([one.images for one in made])
            seconds = sum(one.seconds for one in made)
            return Samples(images, seconds, made[0].network_calls)
        rows = 0

        def count(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal rows
            rows += len(args[0] if args else next(iter(kwargs.values())))

        hooks = [net.register_forward_pre_hook(count, with_kwargs=True) for net in self.nets]
        device = next(self.nets[0].parameters()).device
        start = _now(device)
        try:
            with noise_from(self.pipeline.scheduler, generator):
                result = self.pipeline(
                    **self._subject(prompts), **self.call, generator=generator, output_type="np"
                )
            seconds = _now(device) - start
        finally:
            for hook in hooks:
                hook.remove()
        pixels = np.asarray(getattr(result, self.output))  # (N, H, W, C), (N, F, H, W, C) in [0, 1]
        tensor = torch.from_numpy(pixels).movedim(-1, -3) * 2 - 1
        return Samples(tensor, seconds, rows / len(prompts))

    def _subject(self, prompts: Sequence[Any]) -> dict[str, Any]:
        if isinstance(prompts[0], Pictured):
            return prompts[0].call(self.image_argument)
        if self.conditioning == "prompt":
            return {"prompt": list(prompts)}
        taken = inspect.signature(type(self.pipeline).__call__).parameters
        condition = (
            {"class_labels": [int(p) for p in prompts]} if self.conditioning == "label" else {}
        )
        return {**condition, **({"batch_size": len(prompts)} if "batch_size" in taken else {})}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def noise_from(scheduler: Any, generator: Any) -> Iterator[None]:
    """Let noise between steps come from `generator` where a pipeline does not pass it on."""
    stock = scheduler.step
    if "generator" not in inspect.signature(stock).parameters:
        yield
        return

    @functools.wraps(stock)
    def step(*args: Any, **kwargs: Any) -> Any:
        return stock(*args, **{"generator": generator, **kwargs})

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
