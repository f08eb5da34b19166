"""From data to what a denoiser reads, and back: sizes, prompts, images, latents."""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stepdistill.core.types import Cond
from stepdistill.families.parts import Parts
from stepdistill.families.vae import decode_latents, encode_images, latent_size


def check_prompts(prompts: Sequence[Any]) -> list[str]:
    """The prompts as a list. Errors: TypeError where one is no string."""
    wrong = [p for p in prompts if not isinstance(p, str)]
    if isinstance(prompts, str) or wrong:
        got = prompts if isinstance(prompts, str) else wrong[0]
        raise TypeError(
            f"encode: expected a list of strings, got {got!r} ({type(got).__name__}). "
            "Pass [prompt, ...]."
        )
    return list(prompts)


class Encoding(Parts):
    """What a family does with data, by its pipeline's own code."""

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, *S) of one latent for height x width px (the model's own size where None)."""
        config, factor = self.config, self.pipeline.vae_scale_factor
        default_size, patch = config.sample_size, config.patch_size
        sides = (latent_size(pixels, default_size, factor, patch) for pixels in (height, width))
        return (config.in_channels, *sides)

    @property
    def default_shape(self) -> tuple[int, ...]:
        """(C, *S) of one latent at the model's own size."""
        return self.sample_shape()

    @property
    def latent_px(self) -> int:
        """px to a side of one latent."""
        factor: int = self.pipeline.vae_scale_factor
        return factor

    @property
    def px_beside(self) -> int:
        """px of what is made that one of the "image" it reads stands for: here they are of one
        size."""
        return 1

    @property
    def size_multiple(self) -> int:
        """px that sides of images are multiples of: of a patch, or of the UNet's deepest level."""
        levels, patch = self.config.get("block_out_channels"), self.config.get("patch_size") or 1
        side = int(patch[-1] if isinstance(patch, list | tuple) else patch)  # of videos: (F, H, W)
        return self.latent_px * (2 ** (len(levels) - 1) if levels else side)

    def image_size(self, resolution: int | None = None) -> tuple[int, int]:
        """(height, width) in px of images of that side, or of the model's own."""
        height, width = (side * self.latent_px for side in self.default_shape[-2:])
        return (height, width) if resolution is None else (resolution, resolution)

    def size_text(self, resolution: int | None = None) -> str:
        """The size of what is made, in words."""
        return " x ".join(map(str, self.image_size(resolution))) + " px"

    @abstractmethod
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """The Cond of B prompts (or labels), through the pipeline's own encoding code."""

    def null(self, bsz: int) -> Cond:
        """The Cond of B empty prompts, as the stock pipeline makes it for guidance."""
        return self.encode([""]).repeat(bsz)

    def encode_at(self, prompts: Sequence[Any], shape: Sequence[int]) -> Cond:
        """`encode` for latents of shape (C, *S), which images beside x_t may have to fit."""
        return self.encode(prompts)

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """What of `encode` the prompts alone decide, for `with_images`."""
        return self.encode(prompts)

    def with_images(self, cond: Cond, images: Mapping[str, Tensor], shape: Sequence[int]) -> Cond:
        """The Cond of `encode_text` with images beside x_t, for latents of shape (C, *S).

        Args: images: by the names in `reads`: "image" and "control" (B, 3, H, W), or of several
            (B, K, 3, H, W), in [-1, 1]; "mask" (B, 1, H, W) in [0, 1], 1 where it is repainted.
        Errors: ValueError for others (see families.beside), TypeError where it reads none.
        """
        raise TypeError(f"{self.name}: expected no images beside the prompt, it reads none.")

    def null_for(self, cond: Cond, null: Cond | None = None) -> Cond:
        """The null counterpart of that very Cond, on its device: its images without the prompt.

        Args: null: one row of `null`, where the caller has it.
        """
        empty = (self.null(1) if null is None else null).repeat(cond.bsz)
        images = {name: cond[name] for name in self.image_keys if name in cond.tensors}
        return Cond({**empty.to(cond.device).tensors, **images})

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Scaled latents (B, C, *S) of images (B, 3, H, W) in [-1, 1]."""
        return encode_images(self.pipeline.vae, images, generator)

    def images(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), or videos (B, 3, F, H, W), in [-1, 1], unclamped."""
        return decode_latents(self.pipeline.vae, latents)

    def pictures(self, images: Tensor) -> Tensor:
        """What is shown of `images`, and what metrics see: here themselves."""
        return images

    def place_encoders(self, dtype: torch.dtype, device: torch.device) -> None:
        """Text encoders in that dtype, and all parts on the device but those of every call: the
        denoiser and `side_nets`."""
        for name, part in self.pipeline.components.items():
            if isinstance(part, PreTrainedModel):
                part.to(dtype)
            if isinstance(part, nn.Module) and name not in (*self.net_parts, *self.side_nets):
                part.to(device)
