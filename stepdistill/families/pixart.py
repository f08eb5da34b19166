"""PixArt-alpha and PixArt-Sigma: a cross-attention transformer on VP latents with masked T5 tokens.

Learned-sigma checkpoints return 2C channels; the first C are the prediction, as in the stock
pipelines. PixArt-alpha at 1024 px is also told resolution and aspect ratio.
"""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.family import net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks
from stepdistill.families.masked_tokens import MaskedTokensFamily


class PixArtFamily(MaskedTokensFamily):
    """PixArtAlphaPipeline and PixArtSigmaPipeline."""

    name: ClassVar[str] = "pixart"
    pipelines: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    tiny = {
        "text_encoder": "t5",
        "transformer": {
            "_class_name": "PixArtTransformer2DModel",
            "num_attention_heads": 2,
            "attention_head_dim": 12,  # three size embeddings share the width
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "sample_size": 8,
            "patch_size": 2,
            "caption_channels": 16,
            "use_additional_conditions": False,
            "interpolation_scale": 1,
        },
        "vae": {"_class_name": "AutoencoderKL", "scaling_factor": 0.13025},
        "scheduler": {"_class_name": "DDIMScheduler", "beta_schedule": "linear"},
    }
    variants = {"pixart_sigma": {"pipeline": "PixArtSigmaPipeline"}}
    net_name: ClassVar[str] = "transformer"
    scales_input: ClassVar[bool] = True
    one_step_x0: ClassVar[tuple[str, ...]] = ("PixArtAlphaPipeline",)

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype = net_dtype(net)
        out: Tensor = net(
            x_t.to(dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond["mask"],
            timestep=model_t.float(),  # exact for indices; the sinusoid is float32 anyway
            added_cond_kwargs=self._size_conditions(x_t, dtype),
            return_dict=False,
        )[0]
        return out[:, : self.config.in_channels]

    def _size_conditions(self, x_t: Tensor, dtype: torch.dtype) -> dict[str, Tensor | None]:
        """resolution (B, 2) in px and aspect_ratio (B, 1); None where the model takes none."""
        if not self.pipeline.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (side * self.pipeline.vae_scale_factor for side in x_t.shape[-2:])
        conditions = {"resolution": [height, width], "aspect_ratio": [height / width]}
        return {
            name: torch.tensor([value], dtype=dtype, device=x_t.device).expand(len(x_t), -1)
            for name, value in conditions.items()
        }

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i", image tokens."""
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return token_blocks(width, transformer_blocks=self.config.num_layers)

    @property
    def call_extras(self) -> dict[str, Any]:
        return {"use_resolution_binning": False}  # its bins hold the released sizes only
