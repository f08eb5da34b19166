"""Stable Diffusion XL with a ControlNet, which is told the sizes too."""

from __future__ import annotations

from typing import ClassVar

from stepdistill.families.sd_controlnet import UNetControlNetFamily
from stepdistill.families.sdxl import StableDiffusionXLFamily


class StableDiffusionXLControlNetFamily(UNetControlNetFamily, StableDiffusionXLFamily):
    """StableDiffusionXLControlNetPipeline."""

    name: ClassVar[str] = "sdxl_controlnet"
    settings_of: ClassVar[str] = "sdxl"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLControlNetPipeline",)
    tiny = "stepdistill.testing.tiny_control:tiny_sdxl_controlnet"
