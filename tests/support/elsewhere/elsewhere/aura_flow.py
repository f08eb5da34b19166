"""A family of somebody else's: AuraFlow, a flow model told t / 1000 and masked T5 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.encoding import check_prompts
from stepdistill.families.family import Family, net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks
from stepdistill.testing.tiny_generic import AURA_FLOW


class AuraFlowFamily(Family):
    """AuraFlowPipeline."""

    name = "aura_flow"
    pipelines = ("AuraFlowPipeline",)
    net_name = "transformer"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    tiny = AURA_FLOW

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype = net_dtype(net)
        out: Tensor = net(
            x_t.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            timestep=model_t.float() / 1000,
            return_dict=False,
        )[0]
        return out

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i", image tokens of the joint blocks, which return text and image."""
        config = self.config
        width = config.num_attention_heads * config.attention_head_dim
        return token_blocks(width, item=1, joint_transformer_blocks=config.num_mmdit_layers)

    @property
    def call_extras(self) -> dict[str, Any]:
        side = self.config.sample_size * self.pipeline.vae_scale_factor
        return {"height": side, "width": side}

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D) of T5, zeros after each prompt's end."""
        embeds, *_ = self.pipeline.encode_prompt(
            check_prompts(prompts),
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
        )
        return Cond({"prompt_embeds": embeds})
