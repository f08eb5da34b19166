"""Images beside x_t: where a batch has them, and what they must be like.

A dataset's item has them as "conditioning" (an image to edit, to refer to, or to be controlled by;
several of them in a further dimension) and "mask". A video that begins with an image finds it under
"image" too, as its items have no image to become.
"""

# Shapes: B batch, K images, H, W in px.

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from stepdistill.core.types import CONDITIONING, MASK
from stepdistill.families.family import Family
from stepdistill.reporting.values import counted

RULES = {
    "image": "images (3, H, W), or several of them (K, 3, H, W)",
    "control": "images (3, H, W), or several of them (K, 3, H, W)",
    "mask": "masks (1, H, W)",
}


def fields_beside(family: type[Family]) -> dict[str, bool]:
    """Keys of an item's images beside the one it becomes -> whether every item has to have it."""
    return {
        _key(name): needed and not family.from_first_frame()
        for name, needed in family.reads.items()
    }


def _key(name: str) -> str:
    return MASK if name == "mask" else CONDITIONING


def images_beside(family: Family | type[Family], item: Mapping[str, Any]) -> dict[str, Any]:
    """What an item, or a batch of them, has of the images that the family reads, by their names."""
    keys = {name: _key(name) for name in family.reads}
    if family.from_first_frame() and CONDITIONING not in item:
        keys["image"] = "image"
    return {name: item[key] for name, key in keys.items() if item.get(key) is not None}


def check_images(
    family: Family | type[Family], images: Mapping[str, Any], where: str, batched: bool = True
) -> None:
    """Errors: ValueError for an image that the family needs and has not, or of another shape.

    Args: where: begins the message. batched: whether shapes begin with B.
    """
    absent = [name for name in family.needs_images() if name not in images]
    if absent:
        columns = " and ".join(
            "mask_file_name" if name == "mask" else "conditioning_file_name" for name in absent
        )
        what = (
            "the video's first frame"
            if family.from_first_frame()
            else f"columns {columns} in the folder's metadata.jsonl"
        )
        raise ValueError(
            f"{where}: expected items with {' and '.join(_article(n) for n in absent)}, {what}, "
            f"which {family.name} reads beside the prompt, got none. Train on images with "
            "captions: --data.train_data_dir DIR."
        )
    for name, image in images.items():
        channels, most = (1, 3) if name == "mask" else (3, 4)
        shape = tuple(image.shape)[batched:] if isinstance(image, Tensor) else ()
        if not 3 <= len(shape) <= most or shape[-3] != channels:
            got = shape or type(image).__name__
            raise ValueError(f"{where}: expected {RULES[name]} as {_article(name)}, got {got}.")


def pictures(processor: Any, images: Tensor, most: int | None = None) -> list[list[Image.Image]]:
    """The K images of each row as PIL, which stock calls begin with: B lists of K.

    Args: processor: the pipeline's own. images: (B, 3, H, W) or (B, K, 3, H, W) in [-1, 1].
    Errors: ValueError for more than `most` of them.
    """
    several = images.unsqueeze(1) if images.ndim == 4 else images
    if most is not None and several.shape[1] > most:
        raise ValueError(
            f"with_images: expected at most {counted(most, 'image')} a row, got "
            f"{several.shape[1]}. The "
            "pipeline's call takes no more."
        )
    made = processor.postprocess(several.flatten(0, 1).cpu(), output_type="pil")
    count = several.shape[1]
    return [made[row * count : (row + 1) * count] for row in range(len(several))]


def stand_in(height: int, width: int | None = None) -> Image.Image:
    """A picture for where no data are: each colour another gradient, so that a wrong scale, order
    of rows or of channels shows."""
    linear = Image.linear_gradient("L")
    colours = (linear, linear.rotate(90), Image.radial_gradient("L"))
    return Image.merge("RGB", colours).resize((width or height, height))


def stand_in_mask(height: int, width: int) -> Image.Image:
    """A mask for where no data are, white where it is repainted: no two of its sides alike."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 4, height // 2, width, height))
    return mask


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "aeio" else f"a {name}"
