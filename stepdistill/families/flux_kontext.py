"""Flux.1 Kontext: Flux.1 dev that reads the image to edit as further tokens.

A reference has the size it comes in, which in a run is that of the image it becomes; the stock call
would first bring it to one of its own sizes of about a megapixel (_auto_resize).
"""

# Shapes: B batch, N tokens, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.flux import FluxFamily
from stepdistill.families.references import ReferenceFamily
from stepdistill.families.vae_sized import PATCH


class FluxKontextFamily(ReferenceFamily, FluxFamily):
    """FluxKontextPipeline."""

    name: ClassVar[str] = "flux_kontext"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxKontextPipeline",)
    tiny = FluxFamily.tiny
    most_references = 1  # of its call, a list is a batch

    def encode_text(self, prompts: Sequence[Any]) -> Cond:
        """See Family.encode_text: as of Flux.1."""
        return FluxFamily.encode(self, prompts)

    def reference_pixels(self, picture: Image.Image) -> Tensor:
        """See ReferenceFamily.reference_pixels."""
        processor, multiple = self.pipeline.image_processor, self.latent_px * PATCH
        size = [side // multiple * multiple for side in (picture.height, picture.width)]
        pixels: Tensor = processor.preprocess(processor.resize(picture, *size), *size)
        return pixels

    def size_options(self, height: int, width: int) -> dict[str, Any]:
        """See Family.size_options: its call would keep to a megapixel."""
        size = super().size_options(height, width)
        return {**size, "max_area": height * width, "_auto_resize": False}

    @property
    def call_extras(self) -> dict[str, Any]:
        return {**super().call_extras, **self.size_options(self.size_px, self.size_px)}
