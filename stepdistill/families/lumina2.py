"""Lumina-Image 2.0: one transformer over masked Gemma tokens and image patches, on a flow path.

The network counts time from noise, 1 - t, and puts out x0 - eps. The prompt follows the stock
system prompt; the null one stands alone, as the stock call encodes its negative prompt.
"""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from stepdistill.core.types import Cond
from stepdistill.families.family import net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks
from stepdistill.families.masked_tokens import MaskedTokensFamily


class Lumina2Family(MaskedTokensFamily):
    """Lumina2Pipeline. Guidance is plain: the stock call also rescales by norms unless told not."""

    name: ClassVar[str] = "lumina2"
    pipelines: ClassVar[tuple[str, ...]] = ("Lumina2Pipeline",)
    tiny = {
        "text_encoder": "gemma",
        "transformer": {
            "_class_name": "Lumina2Transformer2DModel",
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 16,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 2, 2),
            "axes_lens": (300, 32, 32),
            "cap_feat_dim": 16,
        },
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 6.0},
        # Factor 8, which the stock class takes for granted.
        "vae": {
            "_class_name": "AutoencoderKL",
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "levels": 4,
        },
    }
    dynamic_shift = True
    net_name: ClassVar[str] = "transformer"
    sends_sigmas: ClassVar[float] = 1.0
    bare_null: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *(f"feed_forward.linear_{i}" for i in (1, 2, 3)),
    )

    def image_tokens(self, height: int | None = None, width: int | None = None) -> int:
        """See Family.image_tokens: the stock call counts the latent's channels."""
        channels: int = self.config.in_channels
        return channels

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype = net_dtype(net)
        out: Tensor = net(
            hidden_states=x_t.to(dtype),
            timestep=1 - model_t.float() / self.pipeline.scheduler.config.num_train_timesteps,
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]
        return -out

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i": text, image and padding tokens; image_features keeps the image."""
        return token_blocks(self.config.hidden_size, layers=self.config.num_layers)

    def image_features(
        self, features: dict[str, Tensor], x_t: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        """(B, N, D) with the N image tokens, which begin after each row's own text."""
        count = x_t.shape[-2] * x_t.shape[-1] // self.config.patch_size**2
        starts = cond["mask"].sum(dim=1, keepdim=True)
        rows = (starts + torch.arange(count, device=starts.device)).unsqueeze(-1)  # (B, N, 1)
        return {
            name: value.gather(1, rows.expand(-1, -1, value.shape[-1]))
            for name, value in features.items()
        }

    def stock_call(
        self, prompts: Sequence[Any], guidance: float, num_steps: int, generator: torch.Generator
    ) -> Tensor:
        """See Family.stock_call. Without the norm rescaling, which is no linear guidance."""
        return self.pipeline(
            prompt=list(prompts),
            guidance_scale=guidance,
            cfg_normalization=False,
            num_inference_steps=num_steps,
            generator=generator,
            output_type="pt",
        ).images
