"""Families whose transformer states no image size: the VAE's sample_size, in px, stands for it.

Where its config has none, the default of the stock call does.
"""

# Shapes: B batch, C channels, H, W spatial.

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from stepdistill.families.family import Family
from stepdistill.families.vae import latent_size

PATCH = 2  # latent pixels to a side of an image token, fixed in these pipelines


class VaeSizedFamily(Family):
    """Sizes in px, and the number of image tokens."""

    def image_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """See Family.image_tokens: 2 x 2 latent pixels each."""
        _, rows, columns = self.sample_shape(height, width)
        return rows * columns // PATCH**2

    @property
    def size_multiple(self) -> int:
        return self.latent_px * PATCH

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """C of one latent."""

    @property
    def size_px(self) -> int:
        """Side of the model's own images."""
        size: int | None = self.pipeline.vae.config.get("sample_size")
        return size or self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        factor = self.pipeline.vae_scale_factor
        size = self.size_px // factor
        sides = (latent_size(pixels, size, factor, PATCH) for pixels in (height, width))
        return (self.latent_channels, *sides)

    @property
    def call_extras(self) -> dict[str, Any]:
        return {"height": self.size_px, "width": self.size_px}
