"""Inpainting UNets of Stable Diffusion: a mask and the rest of the image as channels beside x_t.

[x_t, mask, latent of the image without what is to be repainted]: nine channels. The latent is drawn
from its posterior. A UNet of four channels is no such model: the stock call then runs a
text-to-image one and pastes the rest back at every step, so there is nothing more to distil.
"""

# Shapes: B batch, C channels, h, w of the latent, H, W in px.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from stepdistill.core.types import Cond
from stepdistill.families.channels import ChannelFamily
from stepdistill.families.parts import Draw
from stepdistill.families.sd import StableDiffusionFamily


class InpaintFamily(ChannelFamily):
    """What every inpainting model reads."""

    reads: ClassVar[Mapping[str, bool]] = {"image": True, "mask": True}
    call_draws: ClassVar[tuple[Draw, ...]] = ("noise", "images")

    def kept_latents(
        self, picture: Image.Image, mask: Image.Image | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(mask (1, 1, H, W) of 0 and 1, scaled latents (1, C, h, w) of the picture under it)."""
        assert mask is not None, "check_images"
        pixels = self.pixels(picture)
        repaint: Tensor = self.pipeline.mask_processor.preprocess(mask).to(pixels)
        return repaint, self.latents(pixels * (repaint < 0.5), generator)


class StableDiffusionInpaintFamily(InpaintFamily, StableDiffusionFamily):
    """StableDiffusionInpaintPipeline with a UNet of nine channels."""

    name: ClassVar[str] = "sd_inpaint"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionInpaintPipeline",)
    tiny = "stepdistill.testing.tiny_beside:tiny_sd_inpaint"
    typed: ClassVar[tuple[str, ...]] = ("num_inference_steps",)
    scales_input: ClassVar[bool] = True
    short_pipelines: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def input_channels(cls, vae: Mapping[str, Any]) -> int:
        """See Family.input_channels: the mask and another latent."""
        return 2 * int(vae["latent_channels"]) + 1

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """See Family.encode_text: as of sd."""
        return StableDiffusionFamily.encode(self, prompts)

    def beside(
        self, picture: Image.Image, mask: Image.Image | None, generator: torch.Generator
    ) -> Tensor:
        """See ChannelFamily.beside: the nearest of the mask's pixels, then the latent."""
        repaint, latents = self.kept_latents(picture, mask, generator)
        return torch.cat([interpolate(repaint, size=latents.shape[-2:]).to(latents), latents], 1)
