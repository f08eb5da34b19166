"""Validation grids as data: addresses, small enough for a page that is written again and again."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

MAX_PX = 1000
_TINY_PX = 360  # below, pixels are shown as squares
_PNG_BYTES = 200_000


def picture(path: Path, alt: str) -> str:
    """An <img> of the file, at most MAX_PX wide or high; empty where it can't be read."""
    try:
        stat = path.stat()
        address, width, height = _encoded(path, stat.st_mtime_ns, stat.st_size)
    except OSError:  # not there, or being written just now
        return ""
    kind = ' class="tiny"' if width < _TINY_PX else ""
    return f'<img{kind} alt="{alt}" width="{width}" height="{height}" src="{address}">'


@lru_cache(maxsize=16)
def _encoded(path: Path, _changed: int, size: int) -> tuple[str, int, int]:
    """(data: address, width, height); kept, since a live page shows most pictures many times."""
    with Image.open(path) as image:
        image.load()
        if max(image.size) <= MAX_PX and size <= _PNG_BYTES:
            kind, data = "png", path.read_bytes()
        else:
            image.thumbnail((MAX_PX, MAX_PX))
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="JPEG", quality=85)
            kind, data = "jpeg", buffer.getvalue()
        width, height = image.size
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", width, height
