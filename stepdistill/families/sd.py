"""Stable Diffusion 1.x and 2.x: a UNet on VP latents, eps or v prediction, one CLIP encoder.

A student may be told the guidance through the stock UNet's `timestep_cond` (see unet_guidance).
"""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline
from torch import Tensor, nn

from stepdistill.core.types import Cond
from stepdistill.families.encoding import check_prompts
from stepdistill.families.family import Family, net_dtype
from stepdistill.families.features import FeatureBlock, unet_blocks
from stepdistill.families.parts import UNET_LORA_TARGETS
from stepdistill.families.unet_guidance import (
    idle_guidance_input,
    timestep_cond,
    with_guidance_input,
)
from stepdistill.families.vae import latent_size


class StableDiffusionFamily(Family):
    """StableDiffusionPipeline and LatentConsistencyModelPipeline (the same but for its loop)."""

    name: ClassVar[str] = "sd"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "LatentConsistencyModelPipeline",
    )
    tiny = "stepdistill.testing.tiny:tiny_sd"
    variants = {"sd_v": {"prediction_type": "v_prediction"}}
    typed: ClassVar[tuple[str, ...]] = ()
    net_name: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = UNET_LORA_TARGETS
    supports_w: ClassVar[bool] = True
    short_pipelines: ClassVar[tuple[str, ...]] = ("LatentConsistencyModelPipeline",)

    @classmethod
    def input_channels(cls, vae: Mapping[str, Any]) -> int:
        """See Family.input_channels: those of a latent."""
        return int(vae["latent_channels"])

    @property
    def embeds_guidance(self) -> bool:
        """See Family.embeds_guidance: true of LCM's UNets."""
        return self.config.time_cond_proj_dim is not None and not idle_guidance_input(self.net)

    def copy_net(self, extra_inputs: Sequence[str] = (), net: nn.Module | None = None) -> nn.Module:
        """A copy of the UNet; with ("w",) it has a guidance input that starts without effect."""
        if tuple(extra_inputs) == ("w",):
            return with_guidance_input(self.net if net is None else net)
        return super().copy_net(extra_inputs, net)

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run.

        Errors: ValueError for w with a UNet that has no guidance projection.
        """
        dtype, dim = net_dtype(net), self.config_of(net).time_cond_proj_dim
        beside = cond.get("channels")  # see channels.py
        joined = x_t if beside is None else torch.cat([x_t, beside.to(x_t)], dim=1)
        out: Tensor = net(
            joined.to(dtype),
            model_t.float(),  # holds every table index exactly; the sinusoid is float32 anyway
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            class_labels=cond.get("noise_level"),
            timestep_cond=timestep_cond(dim, w, dtype),
            added_cond_kwargs=self.added_conditions(x_t, cond, dtype),
            return_dict=False,
        )[0]
        return out

    def added_conditions(
        self, x_t: Tensor, cond: Cond, dtype: torch.dtype
    ) -> dict[str, Tensor] | None:
        """The UNet's added_cond_kwargs; none here."""
        return None

    def settle_guidance(self, pipeline: Any, guidance: float) -> bool:
        """See Family.settle_guidance: stock calls make no null pass for UNets told the guidance.

        Told through a projection of zeros, it has no effect. A student that reads w keeps it. The
        calls that know no such UNets read nothing.
        """
        if not self.supports_w or pipeline.unet.config.time_cond_proj_dim is not None:
            return False
        pipeline.register_modules(unet=with_guidance_input(pipeline.unet))
        return True

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid", "down.i" and "up.i", all maps."""
        return unet_blocks(self.config.block_out_channels)

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        size = self.config.sample_size
        own_h, own_w = (size, size) if isinstance(size, int) else size
        factor = self.pipeline.vae_scale_factor
        return (
            self.config.out_channels,  # it may read more
            latent_size(height, own_h, factor),
            latent_size(width, own_w, factor),
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D)."""
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(check_prompts(prompts), device, 1, False)
        return Cond({"prompt_embeds": embeds})

    def stock_call(
        self, prompts: Sequence[Any], guidance: float, num_steps: int, generator: torch.Generator
    ) -> Tensor:
        """See Family.stock_call. LCM's own loop takes its own scheduler only: run the plain one."""
        if not isinstance(self.pipeline, LatentConsistencyModelPipeline):
            return super().stock_call(prompts, guidance, num_steps, generator)
        parts = {**self.pipeline.components, "requires_safety_checker": False}
        plain: Any = StableDiffusionPipeline(**parts)
        plain.set_progress_bar_config(disable=True)
        return type(self)(plain).stock_call(prompts, guidance, num_steps, generator)
