"""Stable Diffusion XL inpainting: sd_inpaint's channels on sdxl's UNet."""

# Shapes: B batch, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.sd_inpaint import StableDiffusionInpaintFamily
from stepdistill.families.sdxl import StableDiffusionXLFamily


class StableDiffusionXLInpaintFamily(StableDiffusionInpaintFamily, StableDiffusionXLFamily):
    """StableDiffusionXLInpaintPipeline with a UNet of nine channels.

    Its call begins at strength 0.9999, which of N steps leaves N - 1 to make: it is told 1.
    """

    name: ClassVar[str] = "sdxl_inpaint"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusionXLInpaintPipeline",)
    tiny = "stepdistill.testing.tiny_beside:tiny_sdxl_inpaint"

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if pipeline.config.requires_aesthetics_score:
            raise ValueError(
                "sdxl_inpaint: expected a pipeline that is told sizes, got one with "
                "requires_aesthetics_score. Inpainting UNets of SDXL base read none."
            )

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """See Family.encode_text: as of sdxl."""
        return StableDiffusionXLFamily.encode(self, prompts)

    def time_ids(self, size: tuple[int, int], width: int, dtype: torch.dtype) -> Tensor:
        """See StableDiffusionXLFamily.time_ids."""
        uncropped = (size, (0, 0), size)
        unread = (None, None)  # scores
        made: tuple[Tensor, Tensor] = self.pipeline._get_add_time_ids(
            *uncropped, *unread, *uncropped, dtype=dtype, text_encoder_projection_dim=width
        )
        return made[0]

    @property
    def length_call(self) -> dict[str, Any]:
        """See Family.length_call."""
        return {"strength": 1.0}

    @property
    def call_extras(self) -> dict[str, Any]:
        return {**super().call_extras, **self.length_call}
