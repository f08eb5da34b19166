"""Flux.1: a joint transformer on packed flow latents; dev is told the guidance.

Packed: 2 x 2 patches of the latent become one token, (B, C, H, W) -> (B, H W / 4, 4 C). Methods see
(B, C, H, W). A network told the guidance gets it in place of a null pass; without any it is told 1.
"""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.encoding import check_prompts
from stepdistill.families.family import net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks
from stepdistill.families.flux_guidance import GuidanceToldFamily, fold_guidance
from stepdistill.families.parts import TRANSFORMER_LORA_TARGETS
from stepdistill.families.references import SequenceFamily
from stepdistill.families.vae_sized import PATCH


class FluxFamily(GuidanceToldFamily, SequenceFamily):
    """FluxPipeline: dev (guidance embedding) and schnell (none)."""

    name: ClassVar[str] = "flux"
    pipelines: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    tiny = {
        "text_encoder_2": "t5",
        "transformer": {
            "_class_name": "FluxTransformer2DModel",
            "in_channels": 4 * 4,  # 2 x 2 patches of four latent channels
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "pooled_projection_dim": 16,
            "guidance_embeds": True,
            "axes_dims_rope": (2, 2, 4),
        },
        # An image of the VAE's size has 16 tokens, the most that the shift is made for.
        "scheduler": {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_image_seq_len": 4,
            "max_image_seq_len": 16,
        },
        "vae": {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159},
        "text_encoder": "clip",
    }
    variants = {
        "flux_schnell": {
            "transformer": {"guidance_embeds": False},
            "scheduler": {"shift": 1.0, "use_dynamic_shifting": False},
        }
    }
    typed = ("num_inference_steps",)
    dynamic_shift = True
    net_name: ClassVar[str] = "transformer"
    lora_targets: ClassVar[tuple[str, ...]] = (*TRANSFORMER_LORA_TARGETS, "proj_mlp")
    sends_sigmas: ClassVar[float] = 1.0

    @classmethod
    def input_channels(cls, vae: Mapping[str, Any]) -> int:
        """See Family.input_channels: those of a packed latent."""
        return PATCH**2 * int(vae["latent_channels"])

    @property
    def latent_channels(self) -> int:
        channels: int = self.config.in_channels // PATCH**2
        return channels

    def settle_guidance(self, pipeline: Any, guidance: float) -> bool:
        """See Family.settle_guidance: the embedding of one guidance is a constant."""
        if self.embeds_guidance:
            pipeline.register_modules(transformer=fold_guidance(pipeline.transformer, guidance))
        return True

    def pack(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents, *latents.shape)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return self.pipeline._unpack_latents(packed, *shape[-2:], vae_scale_factor=1)

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype, images = net_dtype(net), self.images_of(x_t, cond)
        embeds = cond["prompt_embeds"].to(dtype)
        ids = [self._positions(latents, dtype) for latents in images]
        for reference in ids[1:]:
            reference[:, 0] = 1
        out: Tensor = net(
            hidden_states=self.tokens_of(x_t, cond, dtype),
            timestep=model_t.float() / 1000,  # the transformer multiplies by 1000 again
            guidance=self.embedded_guidance(model_t, w),
            pooled_projections=cond["pooled"].to(dtype),
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),
            img_ids=torch.cat(ids),
            return_dict=False,
        )[0]
        return self.of_x_t(out, x_t)

    def _positions(self, latents: Tensor, dtype: torch.dtype) -> Tensor:
        """(N, 3) of the tokens of an image."""
        bsz, _, height, width = latents.shape
        sides = (height // PATCH, width // PATCH)
        ids: Tensor = self.pipeline._prepare_latent_image_ids(bsz, *sides, latents.device, dtype)
        return ids

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i", joint then single: image tokens (a block returns text, image)."""
        config = self.config
        counts = {
            "transformer_blocks": config.num_layers,
            "single_transformer_blocks": config.num_single_layers,
        }
        width = config.num_attention_heads * config.attention_head_dim
        return token_blocks(width, item=1, **counts)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D): T5 tokens; pooled (B, D'): CLIP."""
        embeds, pooled, _ = self.pipeline.encode_prompt(
            check_prompts(prompts), None, device=self.pipeline.text_encoder.device
        )
        return Cond({"prompt_embeds": embeds, "pooled": pooled})

    def stock_call(
        self, prompts: Sequence[Any], guidance: float, num_steps: int, generator: torch.Generator
    ) -> Tensor:
        """See Family.stock_call. Without an embedding, guidance is the stock true_cfg_scale."""
        if self.embeds_guidance:
            return super().stock_call(prompts, guidance, num_steps, generator)
        return self.pipeline(
            prompt=list(prompts),
            negative_prompt=[""] * len(prompts),
            true_cfg_scale=guidance,
            num_inference_steps=num_steps,
            generator=generator,
            output_type="pt",
            **self.call_extras,
        ).images
