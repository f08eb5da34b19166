"""ACE-Step 1.5: a transformer over packed lyrics, timbre and text, on a flow path told in [0, 1].

The stock call makes its own grid (shift 3), takes latents channel-last and guides by APG with
momentum (arXiv:2410.02416); here each guided call is APG without, the stock call's first.
The network reads its condition without a mask: rows of other lengths are called apart, which is
what the stock call does with one prompt at a time. Lyrics are empty: instrumental music.
"""

# Shapes: B batch, C channels, L length, N tokens, D width.

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.pipelines.ace_step import pipeline_ace_step
from torch import Tensor

from stepdistill.core.path import rows
from stepdistill.core.types import Cond
from stepdistill.families.ace_step_rows import STOCK_SECONDS, PackedPrompts, by_length, in_order
from stepdistill.families.family import net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks


class AceStepFamily(PackedPrompts):
    """AceStepPipeline, from text. A VAE config's entry sample_size, in samples, states another
    length than the stock call's default."""

    name: ClassVar[str] = "ace_step"
    pipelines: ClassVar[tuple[str, ...]] = ("AceStepPipeline",)
    tiny = "stepdistill.testing.tiny_audio:tiny_ace_step"
    sends_sigmas: ClassVar[float] = 3.0
    packed_noise: ClassVar[bool] = True
    grid_argument: ClassVar[str] = "timesteps"
    typed: ClassVar[tuple[str, ...]] = ("num_inference_steps",)
    lora_targets: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0"),
        *("gate_proj", "up_proj", "down_proj"),
    )

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        _, length = self.latent_shape
        device = pipeline.condition_encoder.silence_latent.device
        silence, _ = pipeline.prepare_src_latents(device, torch.float32, latent_length=length)
        self._context = torch.cat([silence, torch.ones_like(silence)], -1)  # (1, L, 2 C)

    @property
    def latent_shape(self) -> tuple[int, int]:
        channels: int = self.config.audio_acoustic_hidden_dim
        return channels, math.ceil(self.seconds * self.pipeline.latents_per_second)

    def run(self, net: Any, x_t: Tensor, model_t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        """See Family.run."""
        dtype = net_dtype(net)
        x, t, embeds = x_t.mT.to(dtype), model_t.to(dtype), cond["prompt_embeds"].to(dtype)
        if self._context.is_meta and not x.is_meta:  # of a model without numbers, as `plan` makes
            self._context = torch.zeros_like(self._context, device=x.device)
        self._context = self._context.to(x.device)
        made = [
            net(
                hidden_states=x[index],
                timestep=t[index],
                timestep_r=t[index],
                encoder_hidden_states=embeds[index, :length],
                context_latents=self._context.to(dtype).expand(len(index), -1, -1),
                return_dict=False,
            )[0]
            for length, index in by_length(cond)
        ]
        return in_order(torch.cat(made), cond).mT

    def guide(self, cond: Tensor, null: Tensor, guidance: float | Tensor) -> Tensor:
        """See Family.guide: the stock call's first step."""
        scale: Any = rows(guidance, cond) if isinstance(guidance, Tensor) else guidance
        kind = {"eta": 0.0, "norm_threshold": 2.5, "use_original_formulation": True}
        return normalized_guidance(cond, null, scale - 1.0, norm_dim=(2,), **kind)

    def feature_blocks(self) -> dict[str, FeatureBlock]:
        """ "mid" and "block.i": a token to patch_size latents."""
        return token_blocks(self.config.hidden_size, layers=self.config.num_hidden_layers)

    def images(self, latents: Tensor) -> Tensor:
        """Waves (B, A, T) at the loudness of the stock call, a peak of -1 dB."""
        waves = super().images(latents)
        peak = waves.abs().amax((1, 2), keepdim=True)
        waves = waves / peak.clamp_min(1.0)
        return waves * (
            10.0 ** (-1.0 / 20.0) / waves.abs().amax((1, 2), keepdim=True).clamp_min(1e-6)
        )

    def pack(self, latents: Tensor) -> Tensor:
        return latents.mT

    def unpack(self, packed: Tensor, shape: Sequence[int]) -> Tensor:
        return packed.mT

    @property
    def call_extras(self) -> dict[str, Any]:
        return {"audio_duration": self.seconds}

    @property
    def length_call(self) -> dict[str, Any]:
        return {} if self.seconds == STOCK_SECONDS else self.call_extras

    def settle_guidance(self, pipeline: Any, guidance: float) -> bool:
        """See Family.settle_guidance: a model that says it is turbo is not guided."""
        pipeline.transformer = copy.copy(pipeline.transformer)
        pipeline.transformer.register_to_config(is_turbo=True)
        pipeline.is_turbo = True
        return True

    def stock_call(
        self, prompts: Sequence[Any], guidance: float, num_steps: int, generator: torch.Generator
    ) -> Tensor:
        """See Family.stock_call. Without momentum from one step to the next."""
        with patch.object(pipeline_ace_step, "MomentumBuffer", lambda momentum: None):
            result = self.pipeline(
                list(prompts),
                lyrics=[""] * len(prompts),
                guidance_scale=guidance,
                num_inference_steps=num_steps,
                generator=generator,
                **self.call_extras,
            )
        return self.images_in(result)
