"""Flux.1 Fill: Flux.1 dev that reads a mask and the rest of the image beside each token of x_t.

A token of x_t stands before those of the masked image's latent and of the mask itself, whose pixels
under one latent are folded into channels: 64 + 64 + 256 in all.
"""

# Shapes: B batch, C channels, h, w of the latent, H, W in px, N tokens, D width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from stepdistill.core.types import Cond
from stepdistill.families.flux import FluxFamily
from stepdistill.families.parts import Draw
from stepdistill.families.sd_inpaint import InpaintFamily
from stepdistill.families.vae_sized import PATCH

_TEXT_TO_IMAGE: Any = FluxFamily.tiny


class FluxFillFamily(InpaintFamily, FluxFamily):
    """FluxFillPipeline. Its call draws a latent of the whole image too, which nobody reads."""

    name: ClassVar[str] = "flux_fill"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxFillPipeline",)
    tiny = {
        **_TEXT_TO_IMAGE,
        "transformer": {
            **_TEXT_TO_IMAGE["transformer"],
            "in_channels": 4 * (4 + 4 + 2 * 2),
            "out_channels": 4 * 4,
        },
    }
    call_draws: ClassVar[tuple[Draw, ...]] = ("unread", "noise", "images")

    @classmethod
    def input_channels(cls, vae: Mapping[str, Any]) -> int:
        """See Family.input_channels."""
        side = 2 ** (len(vae["block_out_channels"]) - 1)
        return PATCH**2 * (2 * int(vae["latent_channels"]) + side**2)

    @property
    def latent_channels(self) -> int:
        channels: int = self.config.out_channels // PATCH**2
        return channels

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """See Family.encode_text: as of Flux.1."""
        return FluxFamily.encode(self, prompts)

    def beside(
        self, picture: Image.Image, mask: Image.Image | None, generator: torch.Generator
    ) -> Tensor:
        """See ChannelFamily.beside: the latent, then the mask's pixels."""
        repaint, latents = self.kept_latents(picture, mask, generator)
        return torch.cat([latents, pixel_unshuffle(repaint, self.latent_px).to(latents)], dim=1)

    def tokens_of(self, x_t: Tensor, cond: Cond, dtype: torch.dtype) -> Tensor:
        """See SequenceFamily.tokens_of: (B, N, D) of all three."""
        channels = cond["channels"].to(x_t)
        split = [self.latent_channels, channels.shape[1] - self.latent_channels]
        parts = (self.pack(part.to(dtype)) for part in (x_t, *channels.split(split, dim=1)))
        return torch.cat(list(parts), dim=2)
