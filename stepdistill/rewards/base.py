"""What the built-in scorers share: validated options, float32 arithmetic, a check of shapes."""

# Shapes: B batch, H, W image size in px.

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from stepdistill.core.method import MethodConfig


class FrozenScorer(nn.Module, ABC):
    """A judge whose weights never train. Implements `core.method.Scorer`.

    kind: its name in SCORERS. Options: its options. judges_by: what it is told beside an image.
    Args: weights: whether to read them; a forecast needs shapes alone.
    """

    kind: ClassVar[str]
    Options: ClassVar[type[MethodConfig]]
    judges_by: ClassVar[Literal["prompts", "images", "nothing"]] = "prompts"

    def __init__(self, options: Any = None, weights: bool = True) -> None:
        super().__init__()

    @classmethod
    def read_options(cls, options: Mapping[str, Any]) -> Any:
        """Validated options. Errors: ValueError naming the wrong ones."""
        try:
            return cls.Options(**options)
        except ValidationError as err:
            faults = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}, got {item['input']!r}"
                for item in err.errors()
            )
            raise ValueError(f"scorer {cls.kind}: {faults}.") from err

    @classmethod
    def check(cls, options: Any) -> None:
        """Errors: ValueError for what can be wrong before weights load."""

    @abstractmethod
    def score(self, images: Tensor, by: Any) -> Tensor:
        """(B,) for images (B, 3, H, W) float32 in [-1, 1]; called outside autocast."""

    def forward(self, images: Tensor, by: Tensor | Sequence[str]) -> Tensor:
        """(B,) float32. Errors: ValueError where images or their number of judges don't fit."""
        if images.ndim != 4 or images.shape[1] != 3 or len(by) != len(images):
            raise ValueError(
                f"scorer {self.kind}: expected images (B, 3, H, W) and B of what they are judged "
                f"by, got {tuple(images.shape)} and {len(by)}."
            )
        # Half precision would drown the differences that scores are made of.
        with torch.autocast(images.device.type, enabled=False):
            return self.score(images.float(), by).float()
