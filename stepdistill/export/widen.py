"""A text-to-image Stable Diffusion as one that reads an image too, as InstructPix2Pix does.

The first convolution gets four input channels more, of weights zero: at first the image changes
nothing, and training has to find out what it is good for.
Source: Brooks et al. 2022, arXiv:2211.09800, Sec. 3.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from torch import nn

from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.storage.folders import refuse_foreign, replacing

READS_NONE = "StableDiffusionPipeline"


def widen_pipeline(model: str | Path | ModelSource, out: str | Path) -> Path:
    """Write the model's StableDiffusionInstructPix2PixPipeline; returns its folder.

    Errors: ValueError for another class than StableDiffusionPipeline, or an `out` with
        anything else in it; before a weight is loaded.
    """
    source, folder = ModelSource.of(model), Path(out)
    refuse_foreign(folder, "output_dir")
    pipeline_class = teacher_facts(source).pipeline
    if pipeline_class != READS_NONE:
        raise ValueError(
            f"model: expected a {READS_NONE}, whose UNet is to read an image too, got a "
            f"{pipeline_class}. Name a text-to-image model of that class."
        )
    pipeline: Any = load_family(source).pipeline
    widen_input(pipeline.unet, 2 * pipeline.vae.config.latent_channels)
    parts = {**pipeline.components, "requires_safety_checker": False}
    with replacing(folder, "output_dir") as aside:
        made = StableDiffusionInstructPix2PixPipeline(**parts)
        made.save_pretrained(aside, safe_serialization=True)
    return folder


@torch.no_grad()
def widen_input(unet: Any, channels: int) -> None:
    """Have a stock UNet read so many channels, of which those after its own have no effect yet."""
    narrow: nn.Conv2d = unet.conv_in
    shape: Any = (narrow.kernel_size, narrow.stride, narrow.padding)
    wide = nn.Conv2d(channels, narrow.out_channels, *shape).to(narrow.weight)
    wide.weight.zero_()
    wide.weight[:, : narrow.in_channels] = narrow.weight
    assert wide.bias is not None
    assert narrow.bias is not None
    wide.bias.copy_(narrow.bias)
    unet.conv_in = wide
    unet.register_to_config(in_channels=channels)
