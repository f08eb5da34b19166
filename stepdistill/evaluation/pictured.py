"""Prompts with pictures: a video's first frame, an image to edit or to be controlled by, a mask."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.core.types import CONDITIONING, MASK
from stepdistill.data.captions import all_captions
from stepdistill.data.metadata import BESIDE_COLUMNS, FILE_COLUMNS, Beside, FolderCaptions
from stepdistill.storage.files import sha256_of

from .images import open_image


@dataclass(frozen=True)
class Pictured:
    """What a pipeline that reads pictures is told for one image or video.

    images: usually one; several of a row whose column is a list. sha256: of all files.
    """

    text: str
    images: tuple[Path, ...]
    mask: Path | None
    sha256: str

    def __str__(self) -> str:
        return f"{self.text} ({self.sha256})"

    def call(self, argument: str) -> dict[str, Any]:
        """Arguments of the stock call. Args: argument: by which it is given the images."""
        images = [open_image(file, "first_frames").convert("RGB") for file in self.images]
        told = {"prompt": self.text, argument: images if len(images) > 1 else images[0]}
        if self.mask is None:
            return told
        return {**told, "mask_image": open_image(self.mask, "first_frames").convert("L")}


def pictured_prompts(folder: str, reads: Mapping[str, bool]) -> list[Pictured]:
    """Those of a folder's metadata.jsonl, of several captions with the first: text, the picture as
    conditioning_file_name or another name that training knows, else as file_name, and a mask where
    one is read.

    Args: reads: Family.reads. Errors: ValueError where there is none, or for a wrong line.
    """
    root = Path(folder)
    columns = "file_name, mask_file_name, text" if "mask" in reads else "file_name, text"
    if not (root / "metadata.jsonl").is_file():
        raise ValueError(
            f"first_frames: expected a folder of images with metadata.jsonl ({columns}), got "
            f"{folder!r}."
        )
    beside = {CONDITIONING: Beside((*BESIDE_COLUMNS[CONDITIONING], *FILE_COLUMNS), True)}
    if "mask" in reads:
        beside[MASK] = Beside(BESIDE_COLUMNS[MASK], True)
    rows = FolderCaptions(root, beside=beside)
    return [_pictured(rows, index) for index in range(len(rows))]


def _pictured(rows: FolderCaptions, index: int) -> Pictured:
    _, caption = rows.row(index)
    files = rows.files_beside(index)
    images, masks = files[CONDITIONING], files.get(MASK, ())
    hashes = [sha256_of(file) for file in (*images, *masks)]
    several = hashlib.sha256("".join(hashes).encode()).hexdigest()
    sha = hashes[0] if len(hashes) == 1 else several
    return Pictured(all_captions(caption)[0], images, next(iter(masks), None), sha[:16])


def text_of(prompt: Any) -> Any:
    """The prompt alone, of a Pictured or of itself."""
    return prompt.text if isinstance(prompt, Pictured) else prompt
