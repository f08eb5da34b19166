"""Images to scaled latents and back with a stock autoencoder, as the stock pipelines do it."""

# Shapes: B batch, C channels, F frames, H, W spatial. Images have 3 colours in [-1, 1].

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def encode_images(vae: Any, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """(z - shift) / scale, float32 (B, C, H', W'): z sampled with `generator`, else its mode.

    A grey VAE (one input channel) reads the mean of the three colours. A video VAE takes images as
    single frames, and videos (B, 3, F, H, W) to latents (B, C, F', H', W'). A graph is built where
    the images have one alone: a family's autoencoder is frozen.
    Errors: ValueError for images of another shape.
    """
    video = is_video_vae(vae)
    if images.ndim not in ((4, 5) if video else (4,)) or images.shape[1] != 3:
        shapes = "images (B, 3, H, W)" + (" or videos (B, 3, F, H, W)" if video else "")
        raise ValueError(f"latents: expected {shapes}, got {tuple(images.shape)}.")
    if vae.config.get("in_channels") == 1:
        images = images.mean(dim=1, keepdim=True)
    single = video and images.ndim == 4
    coded = vae.encode((images.unsqueeze(2) if single else images).to(vae.device, vae.dtype))
    if "latent" in coded:  # AutoencoderDC has no distribution
        z = coded.latent
    else:
        dist = coded.latent_dist
        z = dist.mode() if generator is None else dist.sample(generator)
    if is_patched_vae(vae):
        z = pixel_unshuffle(z, vae.config.patch_size[0])
    shift, scale = scaling(vae, z.ndim)
    scaled: Tensor = (z.float() - shift.to(z.device)) / scale.to(z.device)
    return scaled.squeeze(2) if single else scaled


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Images float32 (B, 3, H, W), or videos (B, 3, F, H, W) of (B, C, F', H', W').

    Unclamped, but that stock video VAEs clamp; gradients flow. Grey images repeat their channel.
    """
    single = is_video_vae(vae) and latents.ndim == 4
    z = latents.unsqueeze(2) if single else latents
    shift, scale = scaling(vae, z.ndim)
    z = z * scale.to(z.device) + shift.to(z.device)
    if is_patched_vae(vae):
        z = pixel_shuffle(z, vae.config.patch_size[0])
    images: Tensor = vae.decode(z.to(vae.device, vae.dtype)).sample.float()
    if single:
        images = images.squeeze(2)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images


@contextmanager
def encoding_modes(vae: Any) -> Iterator[None]:
    """Within: stock calls get the mode of what they draw of an image's latent, as a Cond has it.

    The draw's spread is that of the autoencoder's posterior, and takes numbers of the generator.
    Args: vae: a pipeline's, or None.
    """
    if vae is None:
        yield
        return
    encode = vae.encode

    def of_mode(*args: Any, **kwargs: Any) -> Any:
        coded = encode(*args, **kwargs)
        if "latent_dist" in coded:
            dist = coded.latent_dist
            dist.sample = lambda generator=None: dist.mode()
        return coded

    vae.encode = of_mode
    try:
        yield
    finally:
        del vae.encode


def is_video_vae(vae: Any) -> bool:
    """Whether the autoencoder's tensors have a dimension of frames (Wan's, Qwen-Image's)."""
    return "temperal_downsample" in vae.config  # spelt so in both classes


def is_patched_vae(vae: Any) -> bool:
    """Whether latents are square patches of the autoencoder's, batch-normed (Flux.2's)."""
    return "batch_norm_eps" in vae.config


def scaling(vae: Any, ndim: int) -> tuple[Tensor, Tensor]:
    """(shift, scale) that broadcast to latents of `ndim` dimensions, by channel where stated."""
    config = vae.config
    if is_video_vae(vae):
        mean, std = (torch.tensor(config[f"latents_{name}"]) for name in ("mean", "std"))
        shape = (1, -1, *[1] * (ndim - 2))
        return mean.view(shape), std.view(shape)
    if is_patched_vae(vae):
        shape = (1, -1, 1, 1)
        var = vae.bn.running_var.float().view(shape) + config.batch_norm_eps
        return vae.bn.running_mean.float().view(shape), var.sqrt()
    shift = float(config.get("shift_factor") or 0.0)
    return torch.tensor(shift), torch.tensor(1.0 / config.scaling_factor)


def latent_size(pixels: int | None, default: int, factor: int, patch: int = 1) -> int:
    """Side of the latent for that many pixels, or `default` where None.

    Errors: ValueError where pixels is no multiple of the VAE's factor times the patch size.
    """
    if pixels is None:
        return default
    if pixels <= 0 or pixels % (factor * patch):
        raise ValueError(f"size: expected a multiple of {factor * patch} px, got {pixels}.")
    return pixels // factor
