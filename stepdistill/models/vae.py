"""Images to scaled latents and back with a stock autoencoder, as the stock pipelines do it."""

# Shapes: B batch, C channels, H, W spatial. Images have 3 colours in [-1, 1].

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_images(vae: Any, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(z - shift) * scaling_factor, float32 (B, C, H', W'): z sampled with `generator`, else mode.

    A grey VAE (one input channel) reads the mean of the three colours.
    Errors: ValueError where images are not (B, 3, H, W).
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"latents: expected images (B, 3, H, W), got {tuple(images.shape)}.")
    if vae.config.in_channels == 1:
        images = images.mean(dim=1, keepdim=True)
    coded = vae.encode(images.to(vae.device, vae.dtype))
    if "latent" in coded:  # AutoencoderDC has no distribution
        z = coded.latent
    else:
        dist = coded.latent_dist
        z = dist.mode() if generator is None else dist.sample(generator)
    scaled: Tensor = (z.float() - shift_of(vae)) * vae.config.scaling_factor
    return scaled


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images float32 (B, 3, H, W), unclamped; gradients flow. Grey images repeat their channel."""
    z = latents / vae.config.scaling_factor + shift_of(vae)
    images: Tensor = vae.decode(z.to(vae.device, vae.dtype)).sample.float()
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


def shift_of(vae: Any) -> float:
    """The VAE's shift_factor; 0 where its config has none."""
    return float(vae.config.get("shift_factor") or 0.0)


def latent_size(pixels: int | None, default: int, factor: int, patch: int = 1) -> int:
    """Side of the latent for that many pixels, or `default` where None.

    Errors: ValueError where pixels is no multiple of the VAE's factor times the patch size.
    """
    if pixels is None:
        return default
    if pixels <= 0 or pixels % (factor * patch):
        raise ValueError(f"size: expected a multiple of {factor * patch} px, got {pixels}.")
    return pixels // factor
