"""Base of families that make sound: latents (C, L) of an AutoencoderOobleck's waves.

"Images" of the other families are here waves (B, A, T) in [-1, 1]; what is looked at is their
spectrogram. A model makes one length, so there is no resolution.
"""

# Shapes: B batch, A audio channels, T samples, C channels and L length of latents.

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stepdistill.families.family import Family
from stepdistill.reporting.sound import spectrogram
from stepdistill.reporting.values import counted


class AudioFamily(Family):
    """Sizes, coding and checking of sound."""

    output: ClassVar[Literal["images", "frames", "audios"]] = "audios"
    one_size: ClassVar[bool] = True
    supports_s: ClassVar[bool] = False  # their time embedders are of classes of their own
    net_name: ClassVar[str] = "transformer"

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int]:
        """(C, L) of one latent."""

    @property
    def sample_rate(self) -> int:
        """Hz."""
        rate: int = self.pipeline.vae.config.sampling_rate
        return rate

    @property
    def channels(self) -> int:
        """Of a wave: 1 or 2."""
        count: int = self.pipeline.vae.config.audio_channels
        return count

    @property
    def hop(self) -> int:
        """Samples to one latent."""
        length: int = self.pipeline.vae.hop_length
        return length

    @property
    def num_samples(self) -> int:
        """T of a wave."""
        return self.latent_shape[1] * self.hop

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(C, L). Errors: ValueError for a size in px."""
        if (height, width) != (None, None):
            raise ValueError(
                f"resolution: expected none for {self.name}, which makes sound of one length, got "
                f"{height if width is None else width}. Leave it out."
            )
        return self.latent_shape

    def image_size(self, resolution: int | None = None) -> tuple[int, int]:
        """Of sound there is none."""
        self.sample_shape(resolution, resolution)
        return (0, 0)

    def size_text(self, resolution: int | None = None) -> str:
        seconds = self.num_samples / self.sample_rate
        return f"{seconds:.4g} s at {self.sample_rate} Hz, {counted(self.channels, 'channel')}"

    @property
    def latent_px(self) -> int:
        return 1

    @property
    def size_multiple(self) -> int:
        return 1

    @torch.no_grad()
    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, C, L) of waves (B, A, T): z sampled with `generator`, else its mode.

        Errors: ValueError for waves of another shape.
        """
        wanted = (self.channels, self.num_samples)
        if images.ndim != 3 or tuple(images.shape[1:]) != wanted:
            raise ValueError(
                f"latents: expected waves {('B', *wanted)}, got {tuple(images.shape)}."
            )
        vae = self.pipeline.vae
        coded = vae.encode(images.to(vae.device, vae.dtype)).latent_dist
        latents: Tensor = coded.mode() if generator is None else coded.sample(generator)
        return latents.float()

    def images(self, latents: Tensor) -> Tensor:
        """Waves (B, A, T), unclamped; gradients flow."""
        vae = self.pipeline.vae
        waves: Tensor = vae.decode(latents.to(vae.device, vae.dtype)).sample.float()
        return waves

    def pictures(self, images: Tensor) -> Tensor:
        return spectrogram(images)

    @classmethod
    def images_in(cls, result: Any) -> Tensor:
        """Waves in [0, 1], 1/2 is silence, as images are compared."""
        return (result.audios.float() / 2 + 0.5).clamp(0, 1)
