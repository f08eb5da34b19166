"""Image folders with captions or class labels, and files of class labels."""

# Shapes: H, W in px; images (3, H, W) in [-1, 1].

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from torch.utils.data import Dataset

from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.fingerprint import list_digest
from stepdistill.data.lines import LineFile
from stepdistill.data.paths import labelled_paths, plain_paths
from stepdistill.data.source import Source


class CaptionFile(Sequence[tuple[Path, str]]):
    """(file, caption) of each line of an image folder's metadata.jsonl, read as they are needed.

    Errors: ValueError for a line that is no object of file_name and text, and for a file that is
        outside the folder or not there: all lines are looked at when it is opened.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.file = root, root / "metadata.jsonl"
        if not self.file.is_file():
            raise ValueError(
                f"train_data_dir: expected {root}/metadata.jsonl with file_name and text, got none."
            )
        self.lines = LineFile(self.file, "train_data_dir")
        inside = root.resolve()
        for number, line in enumerate(self.lines, 1):
            path, _ = self._parse(line, number)
            if inside not in path.resolve().parents:
                raise ValueError(f"{self.file}: expected files inside {root}, got {path}.")
            if not path.is_file():
                raise ValueError(f"{self.file}: expected every file to exist, got no {path}.")

    def _parse(self, line: str, number: int) -> tuple[Path, str]:
        try:
            row = json.loads(line)
            return self.root / row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(
                f"{self.file}:{number}: expected an object with file_name and text, got {err!r}."
            ) from err

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> tuple[Path, str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Path, str]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._parse(self.lines[index], index + 1)

    def __iter__(self) -> Iterator[tuple[Path, str]]:
        return (self._parse(line, number) for number, line in enumerate(self.lines, 1))


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
        self.items: Sequence[tuple[Path, Any]]
        if plain:
            self.key, self.items = "", plain_paths(root)
        else:
            self.items = labelled_paths(root) if labels else CaptionFile(root)
        if not self.items:
            raise ValueError(f"train_data_dir: expected images, got none in {root}.")

    def fingerprint(self) -> str:
        """sha256 of the images' paths, captions and sizes in bytes."""
        return list_digest(
            (path.parent.name, path.name, text, path.stat().st_size if path.is_file() else -1)
            for path, text in self.items
        )

    def __len__(self) -> int:
        return len(self.items)

    def condition(self, index: int) -> dict[str, Any]:
        return {self.key: self.items[index][1]} if self.key else {}

    def image_bytes(self, index: int) -> tuple[bytes, str]:
        path = self.items[index][0]
        try:
            return path.read_bytes(), path.name
        except OSError as err:
            raise CorruptItemError(path.name) from err


class LabelFileDataset(Dataset[dict[str, Any]]):
    """Class labels only, one integer a line."""

    def __init__(self, labels: Iterable[int]) -> None:
        self.labels = array("q", labels)

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

    def fingerprint(self) -> str:
        """sha256 of the labels."""
        return list_digest(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"label": self.labels[index]}
