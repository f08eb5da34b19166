"""The digits' two judges: see caption_scorer."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from stepdistill.rewards import SCORERS

from .caption_scorer import WIDTH, CaptionScorer
from .data import IMAGE_PX, load_digit_splits


class DigitScorer(CaptionScorer):
    """Of a digit and its prompt."""

    kind: ClassVar[str] = "digits"
    part: ClassVar[int] = 0
    size: ClassVar[int] = IMAGE_PX
    example: ClassVar[str] = "a handwritten seven"

    def tower(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * (IMAGE_PX // 2) ** 2, WIDTH),
        )

    @classmethod
    def vocabulary(cls) -> list[str]:
        with torch.device("cpu"):  # a forecast makes what it makes on another
            prompts = set(load_digit_splits().train.prompts)
        return sorted({word for prompt in prompts for word in prompt.split()})

    @classmethod
    def pictures(cls) -> tuple[Tensor, Callable[[], list[str]]]:
        train = load_digit_splits().train
        prompts = train.prompts[cls.part :: 2]
        return train.images[cls.part :: 2], lambda: prompts

    def seen(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)


class HeldOutDigitScorer(DigitScorer):
    """The judge that is kept out of training."""

    kind: ClassVar[str] = "digits_held_out"
    part: ClassVar[int] = 1


def register_scorers() -> None:
    """Let rewards name the demos' judges."""
    from .emoji.scorer import EmojiScorer, HeldOutEmojiScorer

    for cls in (DigitScorer, HeldOutDigitScorer, EmojiScorer, HeldOutEmojiScorer):
        SCORERS[cls.kind] = f"{cls.__module__}:{cls.__name__}"
