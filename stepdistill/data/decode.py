"""Picture files as a viewer shows them, from the formats that are named here and no others.

Pillow opens whatever it can sniff, EPS among it, which starts Ghostscript: the format is looked for
by content, among FORMATS alone.
"""

# Shapes: H, W in px; images (3, H, W) in [-1, 1].

from __future__ import annotations

import hashlib
import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from stepdistill.data.corrupt import CorruptItemError

# Pillow's formats, and the endings of file names that are taken for pictures.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (),  # JPEG files of some cameras
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MAX_PIXELS = 8192 * 8192  # 200 MB as RGB; a file of a few kB can claim any size
BACKGROUND = "white"  # what shows through transparent pixels, as on a page
_RULES = 2  # version of what is made of a file, part of the names of cached latents


def decode_image(data: bytes, name: str, size_px: int | None) -> Tensor:
    """(3, H, W) float32 in [-1, 1]; with size_px, resized and centre-cropped to a square.

    Turned by its EXIF orientation; 16 bits a channel scaled, floats taken as [0, 1]; transparent
    pixels over BACKGROUND; of an animation the first frame, said once.
    Errors: CorruptItemError where the bytes are no whole image of FORMATS, have more than
        MAX_PIXELS, or floats outside [0, 1].
    """
    try:
        with Image.open(io.BytesIO(data), formats=_known()) as image:
            rows, columns = image.height, image.width
            if rows * columns > MAX_PIXELS:
                raise ValueError(f"{columns} x {rows} px")
            if getattr(image, "is_animated", False) and image.format != "MPO":
                warnings.warn("data: of animated pictures the first frame is taken.", stacklevel=2)
            shown = _rgb(ImageOps.exif_transpose(image))
    except Exception as err:  # decoders raise whatever broken bytes make them stumble over
        raise CorruptItemError(name) from err
    if size_px is not None:
        shown = ImageOps.fit(shown, (size_px, size_px), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1).float()
    return pixels / 127.5 - 1.0


def image_content(data: bytes, size_px: int | None) -> str:
    """A name for what `decode_image` makes of these bytes."""
    return hashlib.sha256(data + f"|{size_px}|{_RULES}".encode()).hexdigest()


def is_picture(name: str) -> bool:
    """Whether a file of that name is taken for a picture: by its ending, hidden ones never."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base[base.rfind(".") :].lower() in IMAGE_SUFFIXES


def _known() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, eight bits a channel."""
    if image.mode.startswith("I"):  # 16-bit grey, in 16 or 32 bits
        return _grey(np.asarray(image).astype(np.float64) / 65535.0)
    if image.mode == "F":
        return _grey(np.asarray(image).astype(np.float64))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        front = image.convert("RGBA")
        behind = Image.new("RGBA", front.size, BACKGROUND)
        return Image.alpha_composite(behind, front).convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    """Of grey values (H, W) in [0, 1]. Errors: ValueError for others."""
    if not (np.isfinite(values).all() and values.min() >= 0.0 and values.max() <= 1.0):
        raise ValueError("values outside [0, 1]")
    return Image.fromarray((values * 255.0).round().astype(np.uint8)).convert("RGB")
