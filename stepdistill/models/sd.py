"""Stable Diffusion 1.x and 2.x: a UNet on VP latents, eps or v prediction, one CLIP encoder.

The guidance embedding of LCM (Luo et al. 2023, arXiv:2310.04378, Sec. 4.3) is the stock UNet's
own `timestep_cond` input: a sinusoid of 1000 w through a bias-free projection.
"""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from stepdistill.core.types import Cond
from stepdistill.models.family import (
    UNET_LORA_TARGETS,
    Family,
    FeatureBlock,
    check_prompts,
    net_dtype,
)
from stepdistill.models.vae import decode_latents, encode_images, latent_size

GUIDANCE_EMBED_DIM = 256  # width of LCM's guidance sinusoid in its released models


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """(B, dim) float32 sinusoid of 1000 w, as `get_guidance_scale_embedding` of the stock pipeline.

    Args: w: (B,) guidance in LCM's convention, w = g - 1.
    """
    half = dim // 2
    step = math.log(10000.0) / (half - 1)
    freqs = torch.exp(torch.arange(half, dtype=torch.float32, device=w.device) * -step)
    angles = 1000.0 * w.float()[:, None] * freqs[None, :]
    emb = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(emb, (0, dim % 2))


class StableDiffusionFamily(Family):
    """StableDiffusionPipeline and LatentConsistencyModelPipeline (the same but for its loop)."""

    name: ClassVar[str] = "sd"
    pipelines: ClassVar[tuple[str, ...]] = (
        "StableDiffusionPipeline",
        "LatentConsistencyModelPipeline",
    )
    net_name: ClassVar[str] = "unet"
    lora_targets: ClassVar[tuple[str, ...]] = UNET_LORA_TARGETS
    supports_w: ClassVar[bool] = True

    def copy_net(self, extra_inputs: Sequence[str] = ()) -> nn.Module:
        """A copy of the UNet; with ("w",) it has a zero-initialised guidance projection.

        Zero makes the copy answer exactly as the teacher before the first update, whatever w.
        """
        net: Any = self.net
        if tuple(extra_inputs) != ("w",):
            return super().copy_net(extra_inputs)
        if net.config.time_cond_proj_dim is not None:  # an LCM teacher has the input already
            return copy.deepcopy(self.net)
        stock: Any = UNet2DConditionModel
        own: nn.Module = stock.from_config(net.config, time_cond_proj_dim=GUIDANCE_EMBED_DIM)
        missing, unexpected = own.load_state_dict(net.state_dict(), strict=False)
        assert missing == ["time_embedding.cond_proj.weight"], missing
        assert not unexpected, unexpected
        nn.init.zeros_(own.get_parameter("time_embedding.cond_proj.weight"))
        return own.to(net.device).type(net_dtype(net)).eval()

    def forward(
        self,
        net: nn.Module,
        x_t: Tensor,
        model_t: Tensor,
        cond: Cond,
        s: Tensor | None = None,
        w: Tensor | None = None,
    ) -> Tensor:
        """See Family.forward; s has no input here and is ignored.

        Errors: ValueError for w with a UNet that has no guidance projection.
        """
        dim: int | None = self.config_of(net).time_cond_proj_dim
        dtype, timestep_cond = net_dtype(net), None
        if w is not None:
            if dim is None:
                raise ValueError(
                    "sd: expected a UNet with time_cond_proj_dim to read w, got one without. "
                    'Give the role extra_inputs ("w",).'
                )
            timestep_cond = guidance_embedding(w, dim).to(dtype)
        out: Tensor = net(
            x_t.to(dtype),
            model_t.float(),  # holds every table index exactly; the sinusoid is float32 anyway
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            timestep_cond=timestep_cond,
            return_dict=False,
        )[0]
        return out

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid", "down.i" and "up.i", all maps."""
        widths = self.config.block_out_channels
        blocks = {"mid": FeatureBlock("mid_block", widths[-1], "map")}
        for i, width in enumerate(widths):
            blocks[f"down.{i}"] = FeatureBlock(f"down_blocks.{i}", width, "map")
        for i, width in enumerate(reversed(widths)):
            blocks[f"up.{i}"] = FeatureBlock(f"up_blocks.{i}", width, "map")
        return blocks

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        size = self.config.sample_size
        own_h, own_w = (size, size) if isinstance(size, int) else size
        factor = self.pipeline.vae_scale_factor
        return (
            self.config.in_channels,
            latent_size(height, own_h, factor),
            latent_size(width, own_w, factor),
        )

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D)."""
        device = self.pipeline.text_encoder.device
        embeds, _ = self.pipeline.encode_prompt(check_prompts(prompts), device, 1, False)
        return Cond({"prompt_embeds": embeds})

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return encode_images(self.pipeline.vae, images, generator)

    def images(self, latents: Tensor) -> Tensor:
        return decode_latents(self.pipeline.vae, latents)
