"""What every source of images has in common: bytes in, (prompt, image, hash of the bytes) out."""

# Shapes: H, W in px; images (3, H, W) in [-1, 1].

from __future__ import annotations

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.order import EpochOrder

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def decode_image(data: bytes, name: str, size_px: int | None) -> Tensor:
    """(3, H, W) float32 in [-1, 1]; with size_px, resized and centre-cropped to a square.

    Errors: CorruptItemError where the bytes are no whole image.
    """
    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except Exception as err:  # decoders raise whatever broken bytes make them stumble over
        raise CorruptItemError(name) from err
    if size_px is not None:
        image = ImageOps.fit(image, (size_px, size_px), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
    return pixels / 127.5 - 1.0


def image_content(data: bytes, size_px: int | None) -> str:
    """A name for what `decode_image` makes of these bytes."""
    return hashlib.sha256(data + f"|{size_px}".encode()).hexdigest()


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
    def told(self, index: int) -> dict[str, Any]:
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
        return {**self.told(index), **decoded(self.image_bytes(index), self.size_px, self.known)}


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
