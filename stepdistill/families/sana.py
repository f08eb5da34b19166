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
    tiny = "stepdistill.testing.tiny_transformers:tiny_sana"
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
