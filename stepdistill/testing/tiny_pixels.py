"""Tiny pipelines of pixel-space UNets. See tiny.py."""

from __future__ import annotations

from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    EDMEulerScheduler,
    UNet2DModel,
)

from stepdistill.testing.tiny_parts import ddim, seeded

PIXELS = 8


def pixel_unet(classes: int | None = None, channels: int = 3) -> UNet2DModel:
    """A UNet2DModel with attention on its lower level."""
    return UNet2DModel(
        sample_size=PIXELS,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=classes,
    )


def tiny_unet2d(channels: int = 3, seed: int = 0) -> DDPMPipeline:
    """An unconditional DDPMPipeline of 8 x 8 px with the stock linear table."""
    with seeded(seed):
        return DDPMPipeline(pixel_unet(channels=channels), ddim(beta_schedule="linear"))


def tiny_edm(
    classes: int | None = 10, restarts: bool = True, seed: int = 0
) -> ConsistencyModelPipeline:
    """An EDM network in a ConsistencyModelPipeline, by class or not.

    restarts: with the scheduler of consistency models, else EDM's Euler.
    """
    with seeded(seed):
        scheduler = CMStochasticIterativeScheduler() if restarts else EDMEulerScheduler()
        return ConsistencyModelPipeline(pixel_unet(classes), scheduler)
