"""The few-step sampler on a family: used by validation, export and tests alike.

Noise is keyed by (seed, image index, step), so an image does not depend on its batch.
"""

# Shapes: B batch, C channels, *S spatial, H, W in px.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.context import normal_rows, stable_seed
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.families.family import Family


def keyed_noise(
    shape: tuple[int, ...], seed: int, indices: Sequence[int], step: int = -1
) -> Tensor:
    """(B, *shape) unit normal on the CPU; row i depends on (seed, indices[i], step) alone."""
    return normal_rows(shape, [stable_seed("image", seed, index, step) for index in indices])


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    family: Family,
    spec: SamplerSpec,
    prompts: Sequence[Any],
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    first_index: int = 0,
) -> Tensor:
    """Latents (B, C, *S), one for each prompt, on the denoiser's device."""
    device = next(family.net.parameters()).device
    shape = family.sample_shape(height, width)
    indices = range(first_index, first_index + len(prompts))
    cond = family.encode_at(prompts, shape).to(device)
    null = family.null_for(cond) if spec.guidance != 1.0 else None
    return sample_x0(
        denoiser,
        spec,
        keyed_noise(shape, seed, indices).to(device),
        cond,
        null,
        fresh_noise=lambda step: keyed_noise(shape, seed, indices, step).to(device),
    )


@torch.no_grad()
def sample_images(
    denoiser: Denoiser,
    family: Family,
    spec: SamplerSpec,
    prompts: Sequence[Any],
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 8,
) -> list[Image.Image]:
    """One PIL image for each prompt."""
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        latents = sample_latents(denoiser, family, spec, part, seed, height, width, first)
        images += to_pil(family.pictures(family.images(latents)))
    return images


def to_pil(images: Tensor) -> list[Image.Image]:
    """PIL images of (B, 1 or 3, H, W) in [-1, 1], clamped; of videos, the frames side by side."""
    if images.ndim == 5:
        images = images.transpose(2, 3).flatten(3)  # (B, 3, H, F W)
    pixels = ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    return [
        Image.fromarray(p.squeeze(-1).numpy() if p.shape[-1] == 1 else p.numpy()) for p in pixels
    ]
