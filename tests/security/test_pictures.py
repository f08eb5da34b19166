"""Pictures as data: name -> (bytes, what is seen in them), or bytes that are told to be none.

Expected of an accepted one is every pixel's value, by hand, and its size before it is decoded.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.decode import decode_image, picture_size

SIDE = 16  # px of a tile of one colour: JPEG keeps it whole
# Two rows of three tiles, no two alike.
TILES = np.array(
    [[(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(255, 255, 255), (0, 0, 0), (128, 128, 128)]],
    dtype=np.uint8,
)
# EXIF's orientation -> what a viewer makes of an array (H, W, 3).
TURNS: dict[int, Callable[[Any], Any]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
LOSSY = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "AVIF": {}}


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **{**LOSSY.get(kind, {}), **options})
    return file.getvalue()


def tiles() -> Image.Image:
    return Image.fromarray(TILES.repeat(SIDE, 0).repeat(SIDE, 1))


def turned(number: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return saved(tiles(), kind, exif=exif)


def png(depth: int, color: int, *values: int, more: bytes = b"") -> bytes:
    """One pixel of 16-bit channels, which Pillow does not write. Args: more: chunks before it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    row = b"\0" + b"".join(v.to_bytes(depth // 8, "big") for v in values)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, depth, color, 0, 0, 0))
    keyed = chunk(b"tRNS", more) if more else b""
    end = chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + keyed + end


def one(mode: str, color: Any, kind: str = "PNG", **options: Any) -> bytes:
    return saved(Image.new(mode, (4, 4), color), kind, **options)


def of_array(value: Any, dtype: Any, kind: str = "PNG") -> bytes:
    return saved(Image.fromarray(np.full((4, 4), value, dtype)), kind)


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def palette(alpha: bytes | None) -> bytes:
    """Red at 0; its alpha."""
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return saved(image, **({} if alpha is None else {"transparency": alpha}))


def moving(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 0, 255))]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:])


# What is seen is of one colour.
SOLID: dict[str, tuple[bytes, tuple[int, int, int]]] = {
    "1": (one("1", 1), (255,) * 3),
    "1 black": (one("1", 0, "TIFF"), (0,) * 3),
    "L": (one("L", 77), (77,) * 3),
    "L of a JPEG": (one("L", 77, "JPEG"), (77,) * 3),
    "L of a BMP": (one("L", 77, "BMP"), (77,) * 3),
    "LA": (one("LA", (100, 255)), (100,) * 3),
    "LA half": (one("LA", (0, 51)), (204,) * 3),
    "P": (palette(None), (255, 0, 0)),
    "P clear": (palette(b"\0\xff"), (255,) * 3),
    "P half": (palette(b"\x33\xff"), (255, 204, 204)),
    "P of a GIF": (one("L", 7, "GIF"), (7, 7, 7)),
    "RGB keyed": (one("RGB", (9, 9, 9), transparency=(9, 9, 9)), (255,) * 3),
    "RGB not keyed": (one("RGB", (9, 9, 9), transparency=(8, 9, 9)), (9, 9, 9)),
    "L keyed": (one("L", 9, transparency=9), (255,) * 3),
    "RGBA": (one("RGBA", (255, 0, 0, 51)), (255, 204, 204)),
    "RGBA of a WebP": (one("RGBA", (255, 0, 0, 51), "WEBP", exact=True), (255, 204, 204)),
    "RGBA of a TIFF": (one("RGBA", (255, 0, 0, 51), "TIFF"), (255, 204, 204)),
    "CMYK of a TIFF": (one("CMYK", (0, 255, 255, 0), "TIFF"), (255, 0, 0)),
    "CMYK of a JPEG": (one("CMYK", (0, 0, 0, 0), "JPEG"), (255,) * 3),
    "YCbCr": (one("YCbCr", (128, 128, 128), "JPEG"), (128,) * 3),
    "YCbCr of a TIFF": (one("YCbCr", (200, 128, 128), "TIFF"), (200,) * 3),
    "I;16": (of_array(0x4080, np.uint16), (64,) * 3),
    "I;16 of a TIFF": (of_array(0x4080, np.uint16, "TIFF"), (64,) * 3),
    "I of a TIFF": (of_array(65535, np.int32, "TIFF"), (255,) * 3),
    "F of a TIFF": (of_array(0.25, np.float32, "TIFF"), (64,) * 3),
    "16-bit grey": (png(16, 0, 30000), (117,) * 3),
    "16-bit grey keyed": (png(16, 0, 30000, more=(30000).to_bytes(2, "big")), (255,) * 3),
    "16-bit grey not keyed": (png(16, 0, 30000, more=(30001).to_bytes(2, "big")), (117,) * 3),
    "16-bit grey clear": (png(16, 4, 30000, 0), (255,) * 3),
    "16-bit RGB": (png(16, 2, 65535, 0, 0x8080), (255, 0, 128)),
    "16-bit RGBA": (png(16, 6, 65535, 0, 0, 65535), (255, 0, 0)),
    "16-bit RGBA clear": (png(16, 6, 65535, 0, 0, 0), (255,) * 3),
    "moving GIF": (moving("GIF"), (255, 0, 0)),
    "moving WebP": (moving("WEBP"), (255, 0, 0)),
    "moving PNG": (moving("PNG"), (255, 0, 0)),
    "pages of a TIFF": (moving("TIFF"), (255, 0, 0)),
}
PLAIN = saved(tiles())
NONE: dict[str, bytes] = {
    "nothing": b"",
    "text": b"<html>404</html>",
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='4' height='4'/>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n",
    "zeros": bytes(1000),
    "a head alone": PLAIN[:8],
    "no end": PLAIN[: len(PLAIN) // 2],
    "a changed byte": PLAIN[:50] + bytes([PLAIN[50] ^ 255]) + PLAIN[51:],
    "no pixels": PLAIN[:16] + bytes(8) + PLAIN[24:],
    "a size of 2^31": PLAIN[:16] + b"\x7f\xff\xff\xff" * 2 + PLAIN[24:],
    "I of a TIFF above 16 bits": of_array(70000, np.int32, "TIFF"),
    "I of a TIFF below 0": of_array(-1, np.int32, "TIFF"),
    "F of a TIFF above 1": of_array(1.5, np.float32, "TIFF"),
    "F of a TIFF without a value": of_array(np.nan, np.float32, "TIFF"),
    **{
        f"half of a {kind}": _half(saved(tiles(), kind)) for kind in ("JPEG", "WEBP", "BMP", "TIFF")
    },
}


def read(data: bytes) -> np.ndarray:
    """(H, W, 3) in 0..255."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an animation's first frame is taken
        image = decode_image(data, "x", None)
    return ((image + 1) * 127.5).round().int().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("number", TURNS)
def test_every_orientation_of_a_camera(number, kind) -> None:
    data, shown = turned(number, kind), TURNS[number](TILES)
    right = shown.repeat(SIDE, 0).repeat(SIDE, 1).astype(int)
    found = read(data)
    assert found.shape == right.shape
    assert np.abs(found - right).max() <= (4 if kind == "JPEG" else 0)
    assert picture_size(data) == right.shape[:2]


@pytest.mark.parametrize("name", SOLID)
def test_what_is_seen(name) -> None:
    data, color = SOLID[name]
    found = read(data)
    assert np.abs(found - np.array(color)).max() <= (2 if "JPEG" in name or name == "YCbCr" else 0)
    assert picture_size(data) == found.shape[:2]


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_picture_is_told_by_its_name(name) -> None:
    with pytest.raises(CorruptItemError, match=r"7\.png"):
        decode_image(NONE[name], "7.png", None)
