"""Images on their way to a feature network: eight bits, crop and resize by a named filter.

Distances depend on this path more than on many a method: Parmar et al. 2022, arXiv:2104.11222.
Everything is done by Pillow on 8-bit pixels, for real and generated images alike.
"""

# B batch, C channels (1 or 3), H, W in px

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from stepdistill.data.decode import known_formats
from stepdistill.data.paths import image_names

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "box": Image.Resampling.BOX,
}


@dataclass(frozen=True)
class Frame:
    """What is done to every image first. size_px: the middle square, resized to that side.

    crop_px: a square patch of that side from the middle, not resized; taken before size_px.
    """

    size_px: int | None = None
    crop_px: int | None = None
    filter: str = "lanczos"

    def __post_init__(self) -> None:
        if self.filter not in FILTERS:
            raise ValueError(
                f"resize_filter: expected one of {sorted(FILTERS)}, got {self.filter!r}."
            )

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.crop_px is not None:
            if min(image.size) < self.crop_px:
                raise ValueError(
                    f"crop_px: expected images of {self.crop_px} px or more, got {image.size}. "
                    "Take a smaller crop, or none."
                )
            image = _middle(image, self.crop_px)
        if self.size_px is not None:
            square = _middle(image, min(image.size))
            image = square.resize((self.size_px, self.size_px), FILTERS[self.filter])
        return image

    def text(self) -> str:
        """In a few words, for the protocol."""
        parts = [f"middle {self.crop_px} px"] if self.crop_px else []
        parts += [f"square to {self.size_px} px, {self.filter}"] if self.size_px else []
        return "; ".join(parts) or "as made"


def middle(length: int, part: int) -> slice:
    """The middle `part` of that length."""
    return slice((length - part) // 2, (length - part) // 2 + part)


def _middle(image: Image.Image, side: int) -> Image.Image:
    x, y = middle(image.width, side), middle(image.height, side)
    return image.crop((x.start, y.start, x.stop, y.stop))


def eight_bit(images: Any) -> list[Image.Image]:
    """Pillow images of an array or tensor (B, H, W, C) in [0, 1], rounded as a PNG would be."""
    pixels = (np.asarray(images, dtype=np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """(B, C, H, W) float32 in [0, 1] of equally large images; C is 1 where all are grey."""
    rows, mode = [], "L" if all(image.mode == "L" for image in images) else "RGB"
    for image in images:
        pixels = torch.from_numpy(np.array(image.convert(mode)))
        rows.append(pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1))
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) > 1:
        raise ValueError(
            f"images: expected one size (C, H, W), got {sorted(shapes)[:3]}. Set size_px."
        )
    return torch.stack(rows).float() / 255


def clean_resize(images: Tensor, size: int) -> Tensor:
    """(B, C, size, size): Pillow's antialiased bicubic on float channels, as clean-fid does."""
    if images.shape[-2:] == (size, size):
        return images
    rows = []
    for image in images.cpu():
        channels = [
            Image.fromarray(c.numpy(), mode="F").resize((size, size), Image.Resampling.BICUBIC)
            for c in image * 255
        ]
        rows.append(torch.stack([torch.from_numpy(np.array(c)) for c in channels]))
    return torch.stack(rows).clamp(0, 255) / 255


def image_files(folder: str | Path, where: str = "reference") -> list[Path]:
    """The images below a folder, sorted by path, hidden ones left out.

    Args: where: the option that names it. Errors: ValueError where there are none.
    """
    root = Path(folder)
    files = [root / name for name in image_names(root)] if root.is_dir() else []
    if not files:
        raise ValueError(f"{where}: expected a folder with images, got none in {str(folder)!r}.")
    return files


def open_image(path: Path, where: str = "reference") -> Image.Image:
    """A grey or RGB image. Errors: ValueError naming a file that is none."""
    try:
        with Image.open(path, formats=known_formats()) as image:
            return image.convert("L" if image.mode in ("L", "1") else "RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as err:
        raise ValueError(f"{where}: expected an image, got {path} ({err}). Remove it.") from err


def pixel_statistics(images: Tensor) -> Tensor:
    """(B, 2): mean saturation (HSV, in [0, 1]) and contrast (deviation of Rec. 709 luma).

    Args: images (B, C, H, W) in [0, 1].
    """
    rgb = images.expand(-1, 3, -1, -1)
    high, low = rgb.amax(1), rgb.amin(1)
    saturation = ((high - low) / high.clamp_min(1e-6)).mean(dim=(1, 2))
    luma = (rgb * rgb.new_tensor([0.2126, 0.7152, 0.0722]).view(1, 3, 1, 1)).sum(1)
    return torch.stack([saturation, luma.flatten(1).std(1, correction=0)], dim=1)
