"""A small decoder that makes the images which losses judge, in place of the VAE's large one.

TAESD and its kin (diffusers' AutoencoderTiny) read a model's scaled latents as they are. Decoding
with gradients through a full VAE takes more memory than the denoiser itself; through these, little.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny

from stepdistill.loading.safe_files import no_pickles
from stepdistill.reporting.values import counted


def decoder_config(source: str) -> dict[str, Any]:
    """config.json of a decoder, before a weight is read.

    Args: source: folder or Hub id. Errors: ValueError where it is no AutoencoderTiny.
    """
    try:
        config: dict[str, Any] = AutoencoderTiny.load_config(source)
    except OSError as err:
        raise ValueError(
            f"decoder: expected a folder or Hub id of an AutoencoderTiny, got {source!r}. {err}"
        ) from err
    if config.get("_class_name") != "AutoencoderTiny":
        raise ValueError(
            f"decoder: expected an AutoencoderTiny, got a {config.get('_class_name')} in "
            f"{source!r}. Leave decoder out to use the pipeline's own VAE."
        )
    return config


def blank_decoder(source: str, channels: int) -> Any:
    """The decoder without its weights; of a Hub id the layout that all released ones have."""
    if Path(source).exists():
        return AutoencoderTiny.from_config(decoder_config(source))
    return AutoencoderTiny(latent_channels=channels)


def load_decoder(source: str, channels: int, device: torch.device | str = "cpu") -> Any:
    """The frozen float32 decoder, for latents of that many channels.

    Errors: ValueError where it was made for others.
    """
    its_channels = decoder_config(source)["latent_channels"]
    if its_channels != channels:
        raise ValueError(
            f"decoder: expected one for latents of {counted(channels, 'channel')}, got {source!r} "
            f"for {its_channels}. Each latent space has its own: taesd, taesdxl, taesd3, taef1."
        )
    with no_pickles("decoder"):
        decoder: Any = AutoencoderTiny.from_pretrained(source, use_safetensors=True)
    return decoder.to(device=device, dtype=torch.float32).eval().requires_grad_(False)
