"""Picture files as a viewer shows them, from the formats that are named here and no others.

Pillow opens whatever it can sniff, EPS among it, which starts Ghostscript: the format is looked for
by content, among FORMATS alone.
"""

# Shapes: H, W in px; images (3, H, W) in [-1, 1].

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from stepdistill.core.types import MASK
from stepdistill.data.corrupt import CorruptItemError

# Pillow's formats, and the endings of file names that are taken for pictures.
FORMATS = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (),  # JPEG files of some cameras
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}
IMAGE_SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
# Endings of other pictures, which are left out with a word.
_OTHER = "heic heif jxl jp2 j2k jpx psd svg eps ico tga ppm pgm pbm pnm pcx dds exr hdr dng cr2 cr3"
OTHER_SUFFIXES = frozenset(f".{name}" for name in _OTHER.split())
Size = tuple[int, int]  # height, width in px
MAX_PIXELS = 8192 * 8192  # 200 MB as RGB; a file of a few kB can claim any size
BACKGROUND = "white"  # what shows through transparent pixels, as on a page
_TIFF_WIDTH, _TIFF_HEIGHT = 256, 257  # tags of the stored picture
_RULES = 3  # version of what is made of a file, part of the names of cached latents


def decode_image(data: bytes, name: str, size_px: int | Size | None) -> Tensor:
    """(3, H, W) float32 in [-1, 1]; with size_px (a square's side, or H and W), resized until it
    covers that size and cropped to its middle.

    Turned by its EXIF orientation; 16 bits a channel scaled, floats taken as [0, 1]; transparent
    pixels over BACKGROUND; of an animation the first frame, said once.
    Errors: CorruptItemError where the bytes are no whole image of FORMATS, have more than
        MAX_PIXELS, or floats outside [0, 1].
    """
    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as image:
            rows, columns = image.height, image.width
            if rows * columns > MAX_PIXELS:
                raise ValueError(f"{columns} x {rows} px")
            if getattr(image, "is_animated", False) and image.format != "MPO":
                warnings.warn("data: of animated pictures the first frame is taken.", stacklevel=2)
            shown = _rgb(ImageOps.exif_transpose(image))
    except Exception as err:  # decoders raise whatever broken bytes make them stumble over
        raise CorruptItemError(name) from err
    if size_px is not None:
        height, width = (size_px, size_px) if isinstance(size_px, int) else size_px
        shown = ImageOps.fit(shown, (width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(shown)).permute(2, 0, 1).float()
    return pixels / 127.5 - 1.0


def decode_beside(
    files: Mapping[str, Sequence[tuple[bytes, str]]], size_px: int | Size | None
) -> dict[str, Tensor]:
    """An item's further images (bytes, name) by their keys, as `decode_image`; several of a key are
    (K, 3, H, W), of the first one's size where none is given. A mask is (1, H, W) in [0, 1].
    """
    made = {}
    for key, named in files.items():
        images: list[Tensor] = []
        for one in named:
            if images and size_px is None:
                size_px = (images[0].shape[1], images[0].shape[2])
            images.append(decode_image(*one, size_px))
        if key == MASK:
            images = [image.mean(dim=0, keepdim=True) / 2 + 0.5 for image in images]
        made[key] = images[0] if len(images) == 1 else torch.stack(images)
    return made


def picture_size(data: bytes) -> Size:
    """(H, W) in px of a picture file as it is shown; the file's first bytes may be enough.

    Errors: OSError, ValueError or another of Pillow's where they tell none.
    """
    with Image.open(io.BytesIO(data), formats=known_formats()) as image:
        # Pillow would decode a whole PNG to look for EXIF data at its end.
        exif = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
        turned = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        width, height = image.size
        if isinstance(image, TiffImageFile):  # some Pillows have turned its size by now
            width, height = (image.tag_v2[tag] for tag in (_TIFF_WIDTH, _TIFF_HEIGHT))
        return (width, height) if turned else (height, width)


def image_content(data: bytes, size_px: int | Size | None) -> str:
    """A name for what `decode_image` makes of these bytes."""
    if isinstance(size_px, tuple):
        height, width = size_px
        size = str(height) if height == width else f"{height}x{width}"
    else:
        size = str(size_px)
    return hashlib.sha256(data + f"|{size}|{_RULES}".encode()).hexdigest()


def is_picture(name: str, suffixes: frozenset[str] = IMAGE_SUFFIXES) -> bool:
    """Whether a file of that name is taken for a picture: by its ending, hidden ones never."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and base[base.rfind(".") :].lower() in suffixes


def readable_suffixes() -> frozenset[str]:
    """Those of IMAGE_SUFFIXES whose format the Pillow that is installed can read."""
    return frozenset(suffix for name in known_formats() for suffix in FORMATS[name])


def known_formats() -> list[str]:
    """Those of FORMATS that the Pillow which is installed can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, eight bits a channel."""
    if image.mode.startswith("I"):  # 16-bit grey, in 16 or 32 bits
        values = np.asarray(image).astype(np.float64) / 65535.0
        if "transparency" in image.info:  # the one value that is
            values[np.asarray(image) == image.info["transparency"]] = 1.0  # BACKGROUND
        return _grey(values)
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
