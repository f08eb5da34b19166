"""Pairs of a model that reads images beside the prompt: of captioned rows with those images.

A pair's images (a video's first frame, an image to edit, a mask) travel in its shard, eight bits a
channel as they came from their files, so that what is trained on the set finds them there.
"""

# Shapes: n pairs, K images, H, W in px.

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from stepdistill.core.types import MASK, Cond
from stepdistill.data.captions import one_caption
from stepdistill.data.corrupt import CorruptItemError
from stepdistill.families.beside import check_images, images_beside
from stepdistill.families.family import Family
from stepdistill.pairs.files import IMAGE_KEYS


def image_digest(image: Tensor) -> str:
    """16 hex digits that name the pixels (3, H, W)."""
    return hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:16]


def read_item(data: Dataset[dict[str, Any]], row: int) -> dict[str, Any]:
    """An item with one of its captions. Errors: ValueError for an image that can't be read."""
    try:
        return one_caption(data[row], 0, row)
    except CorruptItemError as err:
        raise ValueError(
            f"pairs: expected images that can be read, got {err}. Repair it or take it out."
        ) from err


def to_bytes(images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """uint8 of an item's images; exact for what came from eight bits."""
    return {
        key: (image * 255.0 if key == MASK else (image + 1.0) * 127.5).round().to(torch.uint8)
        for key, image in images.items()
    }


def from_bytes(images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An item's images again: in [-1, 1], a mask in [0, 1]."""
    return {
        key: image.float() / 255.0 if key == MASK else image.float() / 127.5 - 1.0
        for key, image in images.items()
    }


class RowsBeside:
    """Captioned rows and their images, as pairs begin with; pair i has row i modulo their number.

    Args: data: items of "prompt" and the images that the family reads. shape: (C, *S) of latents.
    Errors: ValueError for an item without such an image, of another shape than the first's, or
        that can't be read; all are read once, before the first network call.
    """

    def __init__(
        self, family: Family, data: Dataset[dict[str, Any]], shape: Sequence[int], device: Any
    ) -> None:
        self.family, self.data, self.shape, self.device = family, data, shape, device
        self.null = family.null(1).to(device)
        items = [self._item(row) for row in range(len(data))]  # type: ignore[arg-type]
        self.prompts = [prompt for prompt, _ in items]
        self.content = [
            [prompt, {key: image_digest(image) for key, image in images.items()}]
            for prompt, images in items
        ]
        layouts = [{key: tuple(x.shape) for key, x in images.items()} for _, images in items]
        odd = next((i for i, one in enumerate(layouts) if one != layouts[0]), None)
        if odd is not None:
            raise ValueError(
                f"pairs: expected images of one size, {layouts[0]} as in the first row, got "
                f"{layouts[odd]} in row {odd + 1}. Give --resolution."
            )
        self.layout = tuple(sorted(layouts[0].items()))

    def _item(self, row: int) -> tuple[str, dict[str, Tensor]]:
        """(prompt, images as uint8) of a row."""
        item = read_item(self.data, row)
        used = images_beside(self.family, item)
        check_images(self.family, used, "pairs", batched=False)
        beside = {
            key: item[key] for key in IMAGE_KEYS if any(item.get(key) is x for x in used.values())
        }
        return item["prompt"], to_bytes(beside)

    def images(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """uint8 images (n, ...) of the numbered pairs by their keys in an item."""
        items = [self._item(row % len(self.prompts))[1] for row in rows]
        return {key: torch.stack([item[key] for item in items]) for key, _ in self.layout}

    def encode(self, prompts: Sequence[Any], images: Mapping[str, Tensor]) -> tuple[Cond, Cond]:
        """(cond, null) of those prompts and their images."""
        cond, used = self.family.encode_text(prompts), from_bytes(images)
        cond = self.family.with_images(cond, images_beside(self.family, used), self.shape)
        return cond.to(self.device), self.family.null_for(cond.to(self.device), self.null)
