"""Pictures on their way into a page or a file: contact sheets and data: addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Picture = str | Path | NDArray[np.uint8]  # a file, or pixels (H, W) or (H, W, 3)

MAX_PX = 1000
TINY_PX = 360  # below, pixels are shown as squares
_PNG_BYTES = 200_000


def ink(values: Any) -> NDArray[np.uint8]:
    """Pixels of one image in [-1, 1]: of (1, H, W) grey ones (H, W), ink dark and paper white; of
    (3, H, W) its colours (H, W, 3)."""
    share = (np.asarray(values, dtype=np.float32).clip(-1, 1) + 1) / 2
    share = 1 - share[0] if len(share) == 1 else share.transpose(1, 2, 0)
    pixels: NDArray[np.uint8] = (255 * share).round().astype(np.uint8)
    return pixels


def contact(
    pictures: Sequence[Picture], side: int = 128, columns: int | None = None
) -> NDArray[np.uint8]:
    """The pictures in rows of `columns` (None: one row), a pixel apart on white, each inside a
    square of `side` px (of its own size where smaller); (H, W) where all are grey."""
    images = [_opened(one) for one in pictures]
    side = min(side, max(max(image.size) for image in images))
    columns = columns or len(images)
    mode = "L" if all(image.mode == "L" for image in images) else "RGB"
    size = (columns * (side + 1) - 1, -(-len(images) // columns) * (side + 1) - 1)
    sheet = Image.new(mode, size, "white")
    for index, image in enumerate(images):
        image.thumbnail((side, side))
        left, top = index % columns * (side + 1), index // columns * (side + 1)
        sheet.paste(image, (left + (side - image.width) // 2, top + (side - image.height) // 2))
    return np.asarray(sheet)


def _opened(picture: Picture) -> Image.Image:
    if not isinstance(picture, (str, Path)):
        return Image.fromarray(picture)
    with Image.open(picture) as image:
        return image.convert("L" if image.mode == "L" else "RGB")


def png(picture: NDArray[np.uint8]) -> bytes:
    """The pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    """A picture's bytes as a data: address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def img(data: bytes, alt: str, more: str = "") -> str:
    """An <img> of a PNG. Args: more: attributes, as HTML."""
    return f'<img{more} alt="{escape(alt)}" src="{data_uri(data)}">'


def file_img(path: Path, alt: str) -> str:
    """An <img> of the file, at most MAX_PX wide or high; empty where it can't be read."""
    try:
        stat = path.stat()
        address, width, height = _encoded(path, stat.st_mtime_ns, stat.st_size)
    except OSError:  # not there, or being written just now
        return ""
    kind = ' class="tiny"' if width < TINY_PX else ""
    return f'<img{kind} alt="{escape(alt)}" width="{width}" height="{height}" src="{address}">'


@lru_cache(maxsize=16)
def _encoded(path: Path, _changed: int, size: int) -> tuple[str, int, int]:
    """(data: address, width, height); kept, since a live page shows most pictures many times."""
    with Image.open(path) as image:
        image.load()
        if max(image.size) <= MAX_PX and size <= _PNG_BYTES:
            return data_uri(path.read_bytes()), *image.size
        image.thumbnail((MAX_PX, MAX_PX))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=85)
        return data_uri(buffer.getvalue(), "jpeg"), *image.size
