"""Qwen-Image: a joint transformer over Qwen2.5-VL tokens and packed flow latents.

Packed as in Flux. Guidance is not linear: the stock call gives every token of the guided
prediction the norm that its conditional one has. The VAE is a video's, used on single frames.
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
from stepdistill.families.references import SequenceFamily
from stepdistill.families.vae_sized import PATCH

MAX_TOKENS = 512  # the stock call's max_sequence_length
NEGATIVE = " "  # the null prompt that the stock call's documentation names


class QwenImageFamily(SequenceFamily):
    """QwenImagePipeline."""

    name: ClassVar[str] = "qwen_image"
    pipelines: ClassVar[tuple[str, ...]] = ("QwenImagePipeline",)
    tiny = "stepdistill.testing.tiny_video:tiny_qwen_image"
    typed = ("num_inference_steps",)
    dynamic_shift = True
    net_name: ClassVar[str] = "transformer"
    sends_sigmas: ClassVar[float] = 1.0
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("img_mlp.net.0.proj", "img_mlp.net.2"),
    )

    @property
    def latent_channels(self) -> int:
        channels: int = self.config.in_channels // PATCH**2
        return channels

    def pack(self, latents: Tensor) -> Tensor:
        return self.pipeline._pack_latents(latents, *latents.shape)

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        latents: Tensor = self.pipeline._unpack_latents(packed, *shape[-2:], vae_scale_factor=1)
        return latents.squeeze(2)  # one frame

    def guide(self, cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
        """See Family.guide: linear, then each token scaled to the norm of its conditional one."""
        wanted = self.pack(cond).norm(dim=-1, keepdim=True)
        guided = self.pack(super().guide(cond, null, guidance))
        return self.unpack(guided * (wanted / guided.norm(dim=-1, keepdim=True)), cond.shape)

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype, images = net_dtype(net), self.images_of(x_t, cond)
        length = cond["length"]
        longest = int(length.max())  # as the stock call pads a batch of its own
        mask = (torch.arange(longest) < length.unsqueeze(1)).to(x_t.device)
        out: Tensor = net(
            hidden_states=self.packed(images, dtype),
            timestep=model_t.float() / 1000,  # the transformer multiplies by 1000 again
            encoder_hidden_states=cond["prompt_embeds"][:, :longest].to(dtype),
            encoder_hidden_states_mask=None if length.min() == longest else mask,
            img_shapes=[[(1, *(side // PATCH for side in x.shape[-2:])) for x in images]]
            * len(x_t),
            return_dict=False,
        )[0]
        return self.of_x_t(out, x_t)

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i", image tokens (a block returns text tokens, image tokens)."""
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return token_blocks(width, item=1, transformer_blocks=self.config.num_layers)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D) of Qwen2.5-VL, zero after each row's length (B,).

        All rows have MAX_TOKENS, so that prompts encoded apart make one batch.
        """
        embeds, mask = self.pipeline.encode_prompt(
            check_prompts(prompts),
            device=self.pipeline.text_encoder.device,
            max_sequence_length=MAX_TOKENS,
        )
        bsz, longest = embeds.shape[:2]
        # No mask: no row is padded.
        length = torch.full((bsz,), longest) if mask is None else mask.sum(dim=1).long().cpu()
        padded = pad(embeds, (0, 0, 0, MAX_TOKENS - longest))
        return Cond({"prompt_embeds": padded, "length": length})

    def null(self, bsz: int) -> Cond:
        return self.encode([NEGATIVE]).repeat(bsz)

    def guided_call(self, guidance: float) -> dict[str, Any]:
        """See Family.guided_call."""
        if guidance == 1.0:
            return {}
        return {"true_cfg_scale": guidance, "negative_prompt": NEGATIVE}

    def settle_guidance(self, pipeline: Any, guidance: float) -> bool:
        """See Family.settle_guidance: a call without negative prompt makes no null pass."""
        return True

    def stock_call(
        self, prompts: Sequence[Any], guidance: float, num_steps: int, generator: torch.Generator
    ) -> Tensor:
        """See Family.stock_call."""
        options = self.guided_call(guidance)
        if options:
            options["negative_prompt"] = [NEGATIVE] * len(prompts)
        return self.pipeline(
            prompt=list(prompts),
            num_inference_steps=num_steps,
            generator=generator,
            output_type="pt",
            **options,
            **self.call_extras,
        ).images
