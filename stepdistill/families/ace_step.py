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
from torch.nn.functional import pad

from stepdistill.core.path import rows
from stepdistill.core.types import Cond
from stepdistill.families.audio import AudioFamily
from stepdistill.families.family import check_prompts, net_dtype
from stepdistill.families.features import FeatureBlock, token_blocks

MAX_TEXT = 256  # the stock call's max_text_length
STOCK_SECONDS = 60.0  # and its audio_duration


class AceStepFamily(AudioFamily):
    """AceStepPipeline, from text. A VAE config's entry sample_size, in samples, states another
    length than the stock call's default."""

    name: ClassVar[str] = "ace_step"
    pipelines: ClassVar[tuple[str, ...]] = ("AceStepPipeline",)
    tiny = "stepdistill.testing.tiny_audio:tiny_ace_step"
    sends_sigmas: ClassVar[float] = 3.0
    packed_noise: ClassVar[bool] = True
    grid_argument: ClassVar[str] = "timesteps"
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
    def seconds(self) -> float:
        """audio_duration of the stock call."""
        size = self.pipeline.vae.config.get("sample_size")
        return STOCK_SECONDS if size is None else size / self.sample_rate

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

    def num_calls(self, cond: Cond) -> int:
        return len(by_length(cond))

    def image_features(
        self, features: dict[str, Tensor], x_t: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        return {name: in_order(value, cond) for name, value in features.items()}

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D), each prompt packed alone, zero after its length (B,)."""
        made = [self._packed(prompt) for prompt in check_prompts(prompts)]
        lengths = torch.tensor([len(row) for row, _ in made])
        room = MAX_TEXT + max(len(row) - text for row, text in made)  # lyrics and timbre are alike
        embeds = [pad(row, (0, 0, 0, room - len(row))) for row, _ in made]
        return Cond({"prompt_embeds": torch.stack(embeds), "length": lengths})

    def _packed(self, prompt: str) -> tuple[Tensor, int]:
        """(tokens (N, D) of one prompt, how many of them are text), as the stock call packs it."""
        pipeline, encoder = self.pipeline, self.pipeline.condition_encoder
        device, seconds = pipeline.text_encoder.device, self.seconds
        instruction = pipeline._get_task_instruction()
        parts = pipeline.encode_prompt(
            [prompt], "", device, audio_duration=seconds, instruction=instruction
        )
        text, text_mask, lyrics, lyrics_mask = parts
        frames = math.ceil(30 * pipeline.latents_per_second)  # of silence, for the timbre
        silence = encoder.silence_latent[:, :frames].to(text)
        dtype = encoder.text_projector.weight.dtype
        packed, _ = encoder(
            text.to(dtype),
            text_mask,
            lyrics.to(dtype),
            lyrics_mask,
            silence.to(dtype),
            torch.arange(1, device=device),
        )
        return packed[0], text.shape[1]

    @torch.no_grad()
    def null(self, bsz: int) -> Cond:
        """See Family.null: one learned token throughout, which fits any length (0)."""
        like = self.encode([""])["prompt_embeds"].expand(bsz, -1, -1)
        embeds = self.pipeline.condition_encoder.null_condition_emb.to(like).expand_as(like)
        return Cond({"prompt_embeds": embeds, "length": torch.zeros(bsz, dtype=torch.int64)})

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


def by_length(cond: Cond) -> list[tuple[int, list[int]]]:
    """(tokens, rows) of each call; rows of any length (0) go with the first."""
    lengths: list[int] = cond["length"].tolist()
    first, *others = sorted({n for n in lengths if n}) or [1]
    return [
        (n, [i for i, own in enumerate(lengths) if own == n or (own == 0 and n == first)])
        for n in (first, *others)
    ]


def in_order(value: Tensor, cond: Cond) -> Tensor:
    """Rows (B, ...) of all calls, one call after another, as the batch has them."""
    order = [row for _, index in by_length(cond) for row in index]
    return value if order == sorted(order) else value[[order.index(i) for i in range(len(order))]]
