"""Z-Image: one transformer over Qwen tokens and image patches, on a flow path.

The network counts time from noise, 1 - t, puts out x0 - eps and takes lists, one tensor a sample.
The stock guidance_scale is g - 1 of null + g (cond - null): 0 means none.
"""

# Shapes: B batch, C channels, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepdistill.core.types import Cond
from stepdistill.families.encoding import check_prompts
from stepdistill.families.family import net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks
from stepdistill.families.vae_sized import PATCH, VaeSizedFamily

MAX_TOKENS = 512  # the stock call's max_sequence_length


class ZImageFamily(VaeSizedFamily):
    """ZImagePipeline."""

    name: ClassVar[str] = "z_image"
    pipelines: ClassVar[tuple[str, ...]] = ("ZImagePipeline",)
    # The stock class fixes the 1024 hidden units of its time embedding.
    tiny = {
        "text_encoder": "qwen",
        "transformer": {
            "_class_name": "ZImageTransformer2DModel",
            "in_channels": 4,
            "dim": 16,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 2, 2],
            "axes_lens": [600, 32, 32],
        },
        "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        "vae": {"_class_name": "AutoencoderKL", "scaling_factor": 0.3611, "shift_factor": 0.1159},
    }
    dynamic_shift = True
    supports_s: ClassVar[bool] = False
    net_name: ClassVar[str] = "transformer"
    sends_sigmas: ClassVar[float] = 1.0
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *(f"feed_forward.w{i}" for i in (1, 2, 3)),
    )

    @property
    def latent_channels(self) -> int:
        channels: int = self.config.in_channels
        return channels

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype = net_dtype(net)
        embeds = cond["prompt_embeds"].to(dtype)
        out: list[Tensor] = net(
            list(x_t.to(dtype).unsqueeze(2)),  # one frame each
            (1000 - model_t.float()) / 1000,
            [row[:n] for row, n in zip(embeds, cond["length"].tolist(), strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(out).squeeze(2)

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i": image, text and padding tokens; image_features keeps the image."""
        return token_blocks(self.config.dim, layers=self.config.n_layers)

    def image_features(
        self, features: dict[str, Tensor], x_t: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        """(B, N, D) with the N image tokens, which come first."""
        count = x_t.shape[-2] * x_t.shape[-1] // PATCH**2
        return {name: value[:, :count] for name, value in features.items()}

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D), zero after each row's length (B,), which the network gets."""
        rows, _ = self.pipeline.encode_prompt(
            check_prompts(prompts),
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
        )
        embeds = torch.stack([pad(row, (0, 0, 0, MAX_TOKENS - len(row))) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return Cond({"prompt_embeds": embeds, "length": lengths})

    def stock_guidance(self, guidance: float) -> float:
        return guidance - 1.0
