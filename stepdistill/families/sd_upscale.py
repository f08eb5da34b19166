"""Stable Diffusion's x4 upscaler: sd's UNet that reads the small image itself, in pixels.

Its autoencoder makes one latent of 4 x 4 px, so an image a quarter as wide has the latent's size.
To that its own noise is added (augmentation), of which the UNet is told how much as a class.
"""

# Shapes: B batch, h, w of the latent.

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.channels import ChannelFamily
from stepdistill.families.parts import Draw
from stepdistill.families.sd import StableDiffusionFamily


class StableDiffusionUpscaleFamily(ChannelFamily, StableDiffusionFamily):
    """StableDiffusionUpscalePipeline. Its call draws noise for the image, then that of x_t.

    Attributes: noise_level: how noisy the small images are: an index of low_res_scheduler's table,
        of which 0 is noise too. The stock call's default.
    """

    name: ClassVar[str] = "sd_upscale"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionUpscalePipeline",)
    tiny = "stepdistill.testing.tiny_beside:tiny_sd_upscale"
    typed = ("num_inference_steps", "guidance_scale")
    supports_w: ClassVar[bool] = False  # its call has no input for it
    short_pipelines: ClassVar[tuple[str, ...]] = ()
    image_keys: ClassVar[tuple[str, ...]] = ("channels", "noise_level")
    call_draws: ClassVar[tuple[Draw, ...]] = ("images", "noise")
    picture_px = 1
    noise_level: int = 20

    @classmethod
    def input_channels(cls, vae: Mapping[str, Any]) -> int:
        """See Family.input_channels: three colours more."""
        return int(vae["latent_channels"]) + 3

    @property
    def size_multiple(self) -> int:
        """See Family.size_multiple: the small image has to be a whole image itself."""
        return math.lcm(super().size_multiple, self.latent_px**2)

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """See Family.encode_text: as of sd."""
        return StableDiffusionFamily.encode(self, prompts)

    def beside(
        self, picture: Image.Image, mask: Image.Image | None, generator: torch.Generator
    ) -> Tensor:
        """See ChannelFamily.beside: the noised small image (1, 3, h, w)."""
        small = self.pipeline.image_processor.preprocess(picture)
        noise = torch.randn(small.shape, generator=generator)
        level = torch.tensor([self.noise_level])
        noised: Tensor = self.pipeline.low_res_scheduler.add_noise(small, noise, level)
        return noised

    def _with(self, cond: Cond, *given: Any, **named: Any) -> Cond:
        """channels (B, 3, h, w), and noise_level (B,), which the UNet reads as a class."""
        made = super()._with(cond, *given, **named)
        levels = torch.full((made.bsz,), self.noise_level, device=made["channels"].device)
        return Cond({**made.tensors, "noise_level": levels})

    def size_options(self, height: int, width: int) -> dict[str, Any]:
        """See Family.size_options: its images have four times the given one's sides."""
        return {}
