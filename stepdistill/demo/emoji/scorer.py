"""The emoji's two judges, of the shipped pictures: see caption_scorer. Not the one that tells
whether a picture shows its caption."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor, nn

from stepdistill.demo.caption_scorer import WIDTH, CaptionScorer

from .captions import TONES, caption, random_caption
from .data import IMAGE_PX, SHIPPED, Emoji
from .teacher import load_pictures


class EmojiScorer(CaptionScorer):
    """Of an emoji and its caption, wide or narrow."""

    kind: ClassVar[str] = "emoji"
    part: ClassVar[int] = 0
    size: ClassVar[int] = IMAGE_PX
    example: ClassVar[str] = "slice of pizza in fluent style"
    epochs: ClassVar[int] = 20

    def tower(self) -> nn.Module:
        layers: list[nn.Module] = []
        for wide, narrow in ((3, 16), (16, 32), (32, 64)):  # 64 px to 8 px
            layers += [nn.Conv2d(wide, narrow, 4, 2, 1), nn.GroupNorm(1, narrow), nn.GELU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (IMAGE_PX // 8) ** 2, WIDTH))

    @classmethod
    def vocabulary(cls) -> list[str]:
        entries = _shipped().entries
        texts = {caption(one, width) for one in entries for width in ("group", "subgroup", "name")}
        return sorted({word for text in texts for word in text.split()} | _TONE_WORDS)

    @classmethod
    def pictures(cls) -> tuple[Tensor, Callable[[], list[str]]]:
        emoji = _shipped()
        index = torch.arange(cls.part, len(emoji.entries), 2)
        draw = random.Random(cls.part)
        shown = [emoji.entries[k] for k in index.tolist()]
        return emoji.images(0, index), lambda: [random_caption(one, draw) for one in shown]


class HeldOutEmojiScorer(EmojiScorer):
    """The judge that is kept out of training."""

    kind: ClassVar[str] = "emoji_held_out"
    part: ClassVar[int] = 1


_TONE_WORDS = {word for tone in TONES.values() for word in f"with {tone} skin in style".split()}


@cache
def _shipped() -> Emoji:
    with torch.device("cpu"):  # a forecast makes what it makes on another
        return load_pictures(SHIPPED)
