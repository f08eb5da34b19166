"""What every source of images has in common: bytes in, (prompt, image, hash of the bytes) out."""

# Shapes: H, W in px; images (3, H, W) in [-1, 1].

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch.utils.data import Dataset

from stepdistill.data.decode import decode_image, image_content
from stepdistill.data.order import EpochOrder


class Source(Dataset[dict[str, Any]], ABC):
    """Samples of bytes, by number.

    Attributes: known: tells of a content name that its latents are at hand, so that the image need
        not be decoded; its item has no "image" then.
    """

    def __init__(self, size_px: int | None) -> None:
        self.size_px = size_px
        self.known: Callable[[str], bool] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def condition(self, index: int) -> dict[str, Any]:
        """{"prompt": text}, {"label": number} or nothing: a sample without its image."""

    @abstractmethod
    def image_bytes(self, index: int) -> tuple[bytes, str] | None:
        """The image's file and a name for it, or None where samples have no images.

        Errors: CorruptItemError where it can't be read.
        """

    def order(self, seed: int) -> EpochOrder | None:
        """The order of its epochs; None means the one of a set without shards."""
        return None

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            **self.condition(index),
            **decoded(self.image_bytes(index), self.size_px, self.known),
        }


def decoded(
    found: tuple[bytes, str] | None, size_px: int | None, known: Callable[[str], bool] | None
) -> dict[str, Any]:
    """{"image", "content"} of an image's (bytes, name), without the image where it is known."""
    if found is None:
        return {}
    content = image_content(found[0], size_px)
    if known is not None and known(content):
        return {"content": content}
    return {"image": decode_image(*found, size_px), "content": content}
