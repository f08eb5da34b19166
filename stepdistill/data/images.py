"""Image folders with captions or class labels, and files of class labels."""

# Shapes: H, W in px; images (3, H, W) in [-1, 1].

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.source import IMAGE_SUFFIXES, Source


class ImageFolderDataset(Source):
    """Images with captions (metadata.jsonl: file_name, text), labels (sub-folders) or neither.

    Args: size_px: side of the square crop; None keeps the files' size (all must agree).
        labels: read sub-folder names as integer class labels instead of captions.
        plain: take all images below the folder and nothing beside them.
    Errors: ValueError where the folder has neither form or no image.
    """

    def __init__(
        self, folder: str | Path, size_px: int | None, labels: bool = False, plain: bool = False
    ) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"train_data_dir: expected a folder, got {str(folder)!r}.")
        super().__init__(size_px)
        self.key = "label" if labels else "prompt"
        if plain:
            files = (p for p in sorted(root.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES)
            self.key, self.items = "", [(p, None) for p in files]
        else:
            self.items = self._by_label(root) if labels else self._by_caption(root)
        if not self.items:
            raise ValueError(f"train_data_dir: expected images, got none in {root}.")

    @staticmethod
    def _by_caption(root: Path) -> list[tuple[Path, Any]]:
        index = root / "metadata.jsonl"
        if not index.is_file():
            raise ValueError(
                f"train_data_dir: expected {root}/metadata.jsonl with file_name and text, got none."
            )
        items = []
        for number, line in enumerate(index.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                    items.append((root / row["file_name"], row["text"]))
                except (ValueError, KeyError, TypeError) as err:
                    raise ValueError(
                        f"{index}:{number}: expected an object with file_name and text, "
                        f"got {err!r}."
                    ) from err
        outside = [p for p, _ in items if root.resolve() not in p.resolve().parents]
        if outside:
            raise ValueError(f"{index}: expected files inside {root}, got {outside[0]}.")
        missing = [p for p, _ in items if not p.is_file()]
        if missing:
            raise ValueError(f"{index}: expected every file to exist, got no {missing[0]}.")
        return items

    @staticmethod
    def _by_label(root: Path) -> list[tuple[Path, Any]]:
        folders = sorted(p for p in root.iterdir() if p.is_dir())
        odd = [p.name for p in folders if not p.name.isdigit()]
        if odd:
            raise ValueError(
                f"train_data_dir: expected sub-folders named by class label, got {odd[:3]}."
            )
        return [
            (path, int(sub.name))
            for sub in folders
            for path in sorted(sub.iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES
        ]

    def __len__(self) -> int:
        return len(self.items)

    def told(self, index: int) -> dict[str, Any]:
        return {self.key: self.items[index][1]} if self.key else {}

    def image_bytes(self, index: int) -> tuple[bytes, str]:
        path = self.items[index][0]
        try:
            return path.read_bytes(), path.name
        except OSError as err:
            raise CorruptItemError(path.name) from err


class LabelFileDataset(Dataset[dict[str, Any]]):
    """Class labels only, one integer a line."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    @classmethod
    def from_file(cls, path: str | Path) -> LabelFileDataset:
        """Errors: ValueError for an empty file or a line that is no integer."""
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"prompts_file: expected a file of class labels, got {str(path)!r}.")
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        odd = [line for line in lines if not line.isdigit()]
        if not lines or odd:
            raise ValueError(
                f"prompts_file: expected one integer class label a line, got {odd[:3] or 'none'}."
            )
        return cls([int(line) for line in lines])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"label": self.labels[index]}
