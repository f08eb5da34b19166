"""Sana: linear attention on flow latents of a deep autoencoder (arXiv:2410.10629), Gemma tokens.

The prompt follows the stock call's instruction text; the empty one stands alone, as the stock
pipeline encodes its negative prompt.
"""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.family import net_dtype
from stepdistill.families.pixart import PixArtFamily


class SanaFamily(PixArtFamily):
    """SanaPipeline: PixArt's masked conditioning and sizes around another network and path."""

    name: ClassVar[str] = "sana"
    pipelines: ClassVar[tuple[str, ...]] = ("SanaPipeline",)
    tiny = {
        "text_encoder": "gemma",
        "transformer": {
            "_class_name": "SanaTransformer2DModel",
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 16,
            "sample_size": 8,
        },
        "vae": {
            "_class_name": "AutoencoderDC",
            "latent_channels": 4,
            "encoder_block_types": "ResBlock",
            "decoder_block_types": "ResBlock",
            "encoder_block_out_channels": (8,) * 3,  # the stock call takes multiples of 32 px
            "decoder_block_out_channels": (8,) * 3,
            "encoder_layers_per_block": (1,) * 3,
            "decoder_layers_per_block": (1,) * 3,
            "encoder_qkv_multiscales": ((),) * 3,
            "decoder_qkv_multiscales": ((),) * 3,
            "scaling_factor": 0.41407,
        },
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    }
    scales_input: ClassVar[bool] = False
    bare_null: ClassVar[bool] = True
    # Its feed-forward is convolutional: the two 1 x 1 layers stand in for the linear ones.
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("conv_inverted", "conv_point"),
    )

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype = net_dtype(net)
        out: Tensor = net(
            x_t.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond["mask"],
            timestep=model_t.float() * self.config.timestep_scale,
            return_dict=False,
        )[0]
        return out[:, : self.config.in_channels]

    @property
    def call_extras(self) -> dict[str, Any]:
        side = self.config.sample_size * self.pipeline.vae_scale_factor
        return {**super().call_extras, "height": side, "width": side}
