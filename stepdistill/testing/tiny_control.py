"""Tiny pipelines with a ControlNet: those of tiny.py, and a copy of their denoiser's encoder."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, FluxControlNetModel, SD3ControlNetModel
from torch import nn

from stepdistill.families.flux import FluxFamily
from stepdistill.testing.assembled import assemble
from stepdistill.testing.tiny import tiny_sd, tiny_sd3, tiny_sdxl
from stepdistill.testing.tiny_parts import seeded, vae


def controlled(pipeline: Any, controlnet: nn.Module, seed: int = 0) -> Any:
    """The ControlNet pipeline of that one's parts. What training begins at zero is random."""
    with seeded(seed + 1), torch.no_grad():
        for param in controlnet.parameters():
            if not param.any():
                nn.init.normal_(param, std=0.2)
    name = type(pipeline).__name__.replace("Pipeline", "ControlNetPipeline")
    parts = {**pipeline.components, "controlnet": controlnet}
    return getattr(diffusers, name)(**parts, **_options(pipeline))


def _options(pipeline: Any) -> dict[str, Any]:
    """What is neither a part nor a default of the pipeline."""
    config = pipeline.config
    names = ("requires_safety_checker", "force_zeros_for_empty_prompt")
    return {name: config[name] for name in names if name in config}


def tiny_sd_controlnet(seed: int = 0) -> Any:
    """A StableDiffusionControlNetPipeline."""
    return controlled(*_with_unet(tiny_sd(seed=seed), seed))


def tiny_sdxl_controlnet(seed: int = 0) -> Any:
    """A StableDiffusionXLControlNetPipeline."""
    return controlled(*_with_unet(tiny_sdxl(seed=seed), seed))


def _with_unet(pipeline: Any, seed: int) -> tuple[Any, nn.Module, int]:
    with seeded(seed):
        unet, levels = pipeline.unet, (4, 8)  # as many as the VAE's
        return pipeline, ControlNetModel.from_unet(unet, "rgb", levels), seed


def tiny_flux_controlnet(
    num_mode: int | None = None, pixels: bool = False, guidance_embeds: bool = True, seed: int = 0
) -> Any:
    """A FluxControlNetPipeline.

    Args: num_mode: of a union. pixels: one that reads these, and halves them three times.
        guidance_embeds: of the transformer; its ControlNet has that input.
    """
    parts = {**FluxFamily.tiny}
    parts["transformer"] = {**parts["transformer"], "guidance_embeds": guidance_embeds}
    with seeded(seed):
        if pixels:
            parts["vae"] = vae(0.3611, 0.1159, levels=4)
        pipeline = assemble("FluxPipeline", parts, seed)
        config = {k: v for k, v in pipeline.transformer.config.items() if k[0] != "_"}
        config |= {"guidance_embeds": True, "num_mode": num_mode, "num_layers": 1}
        config |= {"conditioning_embedding_channels": 4, "patch_size": 2} if pixels else {}
        controlnet = FluxControlNetModel.from_config(config)
        if num_mode is not None:
            controlnet.register_to_config(control_mode=num_mode - 1)
        return controlled(pipeline, controlnet, seed)


def tiny_sd3_controlnet(force_zeros: bool = True, without_text: bool = False, seed: int = 0) -> Any:
    """A StableDiffusion3ControlNetPipeline.

    Args: force_zeros: as InstantX's. without_text: as 3.5 Large's, which read no text.
    """
    with seeded(seed):
        pipeline = tiny_sd3(seed=seed)
        config = {k: v for k, v in pipeline.transformer.config.items() if k[0] != "_"}
        config |= {"num_layers": 1, "extra_conditioning_channels": 0}
        config |= {"force_zeros_for_pooled_projection": force_zeros}
        if without_text:
            config |= {"joint_attention_dim": None, "use_pos_embed": False}
        taken = SD3ControlNetModel.from_config(config)
        return controlled(pipeline, taken, seed)
