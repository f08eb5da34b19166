"""Stable Diffusion 3 and 3.5: a joint (MM-DiT) transformer on a flow path, with or without T5."""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.encoding import check_prompts
from stepdistill.families.family import Family, net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks


class StableDiffusion3Family(Family):
    """StableDiffusion3Pipeline. Without T5 its tokens are zeros, as the stock pipeline has it."""

    name: ClassVar[str] = "sd3"
    pipelines: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    tiny = "stepdistill.testing.tiny:tiny_sd3"
    variants = {"sd35": {"version": "3.5"}}
    dynamic_shift = True
    net_name: ClassVar[str] = "transformer"

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype = net_dtype(net)
        out: Tensor = net(
            hidden_states=x_t.to(dtype),
            timestep=model_t.float(),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return out

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i", image tokens (a block returns text tokens, image tokens)."""
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return token_blocks(width, item=1, transformer_blocks=self.config.num_layers)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D): CLIP then T5 tokens; pooled (B, D'): both CLIP projections."""
        texts = check_prompts(prompts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts,
            texts,
            texts,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
        )
        return Cond({"prompt_embeds": embeds, "pooled": pooled})
