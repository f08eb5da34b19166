"""Pairs of real images: their latents, and the noise the teacher's ODE run backwards ends at.

2-rectified flow++'s last step (config G) trains on them after the teacher's own pairs: real data,
still coupled to noise by the teacher. The files are those of `stepdistill pairs`.
Source: Lee et al. 2024, arXiv:2405.20320, Sec. 4; 128 network calls there.
"""

# Shapes: B batch, C channels, *S spatial, H, W in px.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.solvers import ode_invert
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.pairs.beside import image_digest, read_item
from stepdistill.pairs.dataset import PairDataset, Pairs, PairWriter, Prompt, write_shards
from stepdistill.pairs.files import PairSettings, digest


def invert_pairs(
    denoiser: Denoiser,
    encode: Callable[[Sequence[Any]], Cond],
    null: Callable[[int], Cond],
    latents: Callable[[Tensor], Tensor],
    images: Dataset[dict[str, Any]],
    folder: str | Path,
    num_pairs: int,
    *,
    shape: Sequence[int],
    model: str,
    teacher: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
    times: tuple[float, ...] = uniform_grid(64),
    batch_size: int = 16,
    shard_size: int = 256,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    progress: bool = True,
) -> PairDataset | None:
    """Invert the first num_pairs images and write them as pairs; whole shards are kept.

    Args:
        encode, null, latents: Family's, or the like. images: items of "image" (3, H, W) in [-1, 1]
            and "prompt" or "label" (neither for models that are told nothing).
        teacher: see `generate_pairs`. times: descending, see `ode_invert`.
    Returns: the finished set; None where other ranks' shards are still missing.
    Errors: ValueError for more pairs than images, an unreadable image, or latents of another shape.
    """
    size = len(images)  # type: ignore[arg-type]
    if not 1 <= num_pairs <= size:
        raise ValueError(
            f"pairs: expected num_pairs from 1 to {size}, the number of images, got {num_pairs}."
        )

    def item(row: int) -> tuple[Tensor, Prompt]:
        read = read_item(images, row)
        prompt: Prompt = read.get("prompt", read.get("label", 0))
        return read["image"], prompt

    def inverted(rows: Sequence[int]) -> Pairs:
        items = [item(row) for row in rows]
        texts = [prompt for _, prompt in items]
        x0 = latents(torch.stack([image for image, _ in items]).to(device)).to(device)
        if tuple(x0.shape[1:]) != tuple(shape):
            raise ValueError(
                f"pairs: expected latents of {tuple(shape)}, got {tuple(x0.shape[1:])} of images "
                f"{tuple(items[0][0].shape[1:])}. Give --resolution."
            )
        noise = ode_invert(denoiser, x0, encode(texts), null(len(rows)), guidance, tuple(times))
        return noise.cpu(), x0.cpu(), texts, {}

    # What the pairs depend on: every image and its prompt, read once before the first network call.
    content = [[image_digest(image), prompt] for image, prompt in map(item, range(num_pairs))]
    settings = PairSettings(
        model=model,
        model_hash=digest(teacher) if teacher else "",
        times=tuple(times),
        guidance=guidance,
        seed=0,
        shape=tuple(shape),
        prompts_hash=digest(content),
        batch_size=batch_size,
        shard_size=shard_size,
        solver="heun, real images inverted",
    )
    writer = PairWriter(folder, settings, num_pairs, teacher)
    return write_shards(writer, inverted, rank, world_size, progress)
