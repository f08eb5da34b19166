"""Tiny pipelines of UNets that read images as channels beside x_t. See tiny.py."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionUpscalePipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)

from stepdistill.testing.tiny import tiny_sd, tiny_sdxl, unet
from stepdistill.testing.tiny_parts import TEXT_WIDTH, seeded, vae

UPSCALER_TABLE = {"beta_start": 0.0001, "beta_end": 0.02}  # the released one's


def tiny_sd_upscale(seed: int = 0) -> StableDiffusionUpscalePipeline:
    """Images of 32 px from such of 8, with the released model's noise tables."""
    text = tiny_sd(seed=seed)
    with seeded(seed + 1):
        return StableDiffusionUpscalePipeline(
            vae=vae(0.08333, levels=3),
            text_encoder=text.text_encoder,
            tokenizer=text.tokenizer,
            unet=unet(TEXT_WIDTH, in_channels=7, num_class_embeds=1000),
            low_res_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", **UPSCALER_TABLE),
            scheduler=DDIMScheduler(
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
                **UPSCALER_TABLE,
            ),
        )


def tiny_sd_inpaint(seed: int = 0) -> StableDiffusionInpaintPipeline:
    """`tiny_sd` with an image and a mask."""
    return StableDiffusionInpaintPipeline(**_parts(9, seed), requires_safety_checker=False)


def tiny_sdxl_inpaint(seed: int = 0) -> StableDiffusionXLInpaintPipeline:
    """`tiny_sdxl` with an image and a mask."""
    parts = tiny_sdxl(seed=seed).components
    sdxl = {n: v for n, v in parts["unet"].config.items() if not n.startswith("_")}
    with seeded(seed + 1):
        parts["unet"] = UNet2DConditionModel(**{**sdxl, "in_channels": 9})
    null = {"force_zeros_for_empty_prompt": True, "add_watermarker": False}
    return StableDiffusionXLInpaintPipeline(**parts, **null)


def tiny_instruct_pix2pix(seed: int = 0) -> StableDiffusionInstructPix2PixPipeline:
    """`tiny_sd` with an image to edit."""
    return StableDiffusionInstructPix2PixPipeline(**_parts(8, seed), requires_safety_checker=False)


def _parts(in_channels: int, seed: int) -> dict[str, Any]:
    """`tiny_sd`'s, with a UNet that reads so many channels."""
    parts = tiny_sd(seed=seed).components
    with seeded(seed + 1):
        return {**parts, "unet": unet(TEXT_WIDTH, in_channels=in_channels)}
