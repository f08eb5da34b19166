"""Wan 2.1 and 2.2: a transformer over UMT5 tokens and video patches, on a flow path.

2.2's A14B has two, one for high and one for low noise (families/experts.py); its 5B tells a time to
each token.

Latents are (C, F', H, W), four frames to one after the first, scaled by channel. No config of a
checkpoint states its size: an entry sample_size = [frames, height, width] in the VAE's, px, does
where there is one, else the stock call's defaults.
"""

# Shapes: B batch, C channels, F frames, H, W spatial, N tokens, D width.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stepdistill.core.causal import chunk_of
from stepdistill.core.types import Cond
from stepdistill.families.causal import make_causal
from stepdistill.families.encoding import check_prompts
from stepdistill.families.expert_family import ExpertFamily
from stepdistill.families.features import FeatureBlock, token_blocks
from stepdistill.families.vae import latent_size

MAX_TOKENS = 512  # the stock call's max_sequence_length
STOCK_SIZE = (81, 480, 832)  # frames, height, width of the stock call


class WanFamily(ExpertFamily):
    """WanPipeline with one transformer, or one for high and one for low noise."""

    name: ClassVar[str] = "wan"
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)
    tiny = "stepdistill.testing.tiny_video:tiny_wan"
    variants = {"wan_tokens": {"expand_timesteps": True}, "wan_experts": {"boundary_ratio": 0.875}}
    supports_s: ClassVar[bool] = False  # some embed a time for each token
    net_name: ClassVar[str] = "transformer"
    output: ClassVar[Literal["images", "frames"]] = "frames"
    one_size: ClassVar[bool] = True  # of its videos
    causal: ClassVar[bool] = True
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("ffn.net.0.proj", "ffn.net.2"),
    )

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width) of the model's own videos, px."""
        frames, height, width = self.pipeline.vae.config.get("sample_size") or STOCK_SIZE
        return frames, height, width

    @property
    def latent_px(self) -> int:
        factor: int = self.pipeline.vae_scale_factor_spatial
        return factor

    def sample_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        frames, *trained_size = self.size
        factor, patch = self.latent_px, self.config.patch_size[1]
        sides = (
            latent_size(asked or px, 0, factor, patch)
            for asked, px in zip((height, width), trained_size, strict=True)
        )
        num_latents = (frames - 1) // self.pipeline.vae_scale_factor_temporal + 1
        return (self.pipeline.vae.config.z_dim, num_latents, *sides)

    @property
    def call_extras(self) -> dict[str, Any]:
        return dict(zip(("num_frames", "height", "width"), self.size, strict=True))

    def token_times(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        """What the network is told: (B,), or (B, N), a time for each token, with 2.2's 5B and
        where each frame has one."""
        _, height, width = self.config.patch_size
        of_frame = (x_t.shape[3] // height) * (x_t.shape[4] // width)
        if model_t.ndim == 2:
            return model_t.float().repeat_interleave(of_frame, dim=1)
        if not self.pipeline.config.expand_timesteps:
            return model_t.float()
        return model_t.float().unsqueeze(1).expand(-1, x_t.shape[2] * of_frame)

    def copy_net(self, extra_inputs: Sequence[str] = (), net: Any = None) -> nn.Module:
        """See Family.copy_net; also a copy that is causal by chunks of frames (causal.py)."""
        chunk = chunk_of(extra_inputs)
        if chunk is None or self.experts is not None or not self.causal:
            return super().copy_net(extra_inputs, net)
        if self.sample_shape()[1] % chunk:
            raise ValueError(
                f"chunk: expected a divisor of the model's {self.sample_shape()[1]} latent frames, "
                f"got {chunk}. Set --method_config.chunk."
            )
        return make_causal(super().copy_net((), net), chunk)

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        model: Any = net
        dtype = model.dtype  # of most weights: a few always stay in float32
        out: Tensor = model(
            hidden_states=x_t.to(dtype),
            timestep=self.token_times(x_t, model_t),
            encoder_hidden_states=cond["prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return out

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i": tokens of all frames; none of two experts, of which each row of a
        batch runs one."""
        if self.experts is not None:
            return {}
        width = self.config.num_attention_heads * self.config.attention_head_dim
        return token_blocks(width, blocks=self.config.num_layers)

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D) of UMT5, zeros after each prompt's end."""
        embeds, _ = self.pipeline.encode_prompt(
            check_prompts(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=MAX_TOKENS,
            device=self.pipeline.text_encoder.device,
        )
        return Cond({"prompt_embeds": embeds})
