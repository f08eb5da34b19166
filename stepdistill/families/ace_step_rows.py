"""ACE-Step's prompts, each packed alone, and calls of rows that are as long as each other."""

# Shapes: B batch, N tokens, D width.

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stepdistill.core.types import Cond
from stepdistill.families.audio import AudioFamily
from stepdistill.families.encoding import check_prompts

MAX_TEXT = 256  # the stock call's max_text_length
STOCK_SECONDS = 60.0  # and its audio_duration


class PackedPrompts(AudioFamily):
    """The condition: tokens of lyrics, timbre and text, of its own length in each row."""

    @property
    def seconds(self) -> float:
        """audio_duration of the stock call."""
        size = self.pipeline.vae.config.get("sample_size")
        return STOCK_SECONDS if size is None else size / self.sample_rate

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> Cond:
        """prompt_embeds (B, N, D), each prompt packed alone, zero after its length (B,)."""
        made = [packed(self.pipeline, prompt, self.seconds) for prompt in check_prompts(prompts)]
        lengths = torch.tensor([len(row) for row, _ in made])
        room = MAX_TEXT + max(len(row) - text for row, text in made)  # lyrics and timbre are alike
        embeds = [pad(row, (0, 0, 0, room - len(row))) for row, _ in made]
        return Cond({"prompt_embeds": torch.stack(embeds), "length": lengths})

    @torch.no_grad()
    def null(self, bsz: int) -> Cond:
        """See Family.null: one learned token throughout, which fits any length (0)."""
        like = self.encode([""])["prompt_embeds"].expand(bsz, -1, -1)
        embeds = self.pipeline.condition_encoder.null_condition_emb.to(like).expand_as(like)
        return Cond({"prompt_embeds": embeds, "length": torch.zeros(bsz, dtype=torch.int64)})

    def num_calls(self, cond: Cond) -> int:
        return len(by_length(cond))

    def image_features(
        self, features: dict[str, Tensor], x_t: Tensor, cond: Cond
    ) -> dict[str, Tensor]:
        return {name: in_order(value, cond) for name, value in features.items()}


def packed(pipeline: Any, prompt: str, seconds: float) -> tuple[Tensor, int]:
    """(tokens (N, D) of one prompt, how many of them are text), as the stock call packs it."""
    encoder, device = pipeline.condition_encoder, pipeline.text_encoder.device
    parts = pipeline.encode_prompt(
        [prompt],
        "",
        device,
        audio_duration=seconds,
        instruction=pipeline._get_task_instruction(),
    )
    text, text_mask, lyrics, lyrics_mask = parts
    frames = math.ceil(30 * pipeline.latents_per_second)  # of silence, for the timbre
    dtype = encoder.text_projector.weight.dtype
    made, _ = encoder(
        text.to(dtype),
        text_mask,
        lyrics.to(dtype),
        lyrics_mask,
        encoder.silence_latent[:, :frames].to(device, dtype),
        torch.arange(1, device=device),
    )
    return made[0], text.shape[1]


def by_length(cond: Cond) -> list[tuple[int, list[int]]]:
    """(tokens, rows) of each call; rows of any length (0) go with the first."""
    lengths: list[int] = cond["length"].tolist()
    first, *others = sorted({n for n in lengths if n}) or [1]
    return [
        (n, [i for i, length in enumerate(lengths) if length == n or (length == 0 and n == first)])
        for n in (first, *others)
    ]


def in_order(value: Tensor, cond: Cond) -> Tensor:
    """Rows (B, ...) of all calls, one call after another, as the batch has them."""
    order = [row for _, index in by_length(cond) for row in index]
    return value if order == sorted(order) else value[[order.index(i) for i in range(len(order))]]
