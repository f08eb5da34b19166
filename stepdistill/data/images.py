"""Image folders with captions or class labels, and files of class labels."""

# Shapes: H, W in px; images (3, H, W) in [-1, 1].

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from stepdistill.data.captions import label_of
from stepdistill.data.fingerprint import list_digest
from stepdistill.data.lines import LineFile
from stepdistill.data.metadata import Beside, FolderCaptions
from stepdistill.data.paths import labelled_paths, plain_paths
from stepdistill.data.source import Source, file_bytes


class ImageFolderDataset(Source):
    """Images with captions (see metadata.py), labels (sub-folders) or neither.

    Args: size_px: see `Source`. labels: read sub-folder names as integer class labels instead of
        captions. plain: take all images below the folder and nothing beside them. column: of the
        captions in metadata.jsonl or .csv. num_labels: of the model, where it is known. beside:
        further images of an item, see FolderCaptions.
    Errors: ValueError where the folder has neither form or no image, and for the first row that is
        wrong.
    """

    def __init__(
        self,
        folder: str | Path,
        size_px: int | None,
        labels: bool = False,
        plain: bool = False,
        column: str = "text",
        num_labels: int | None = None,
        beside: Mapping[str, Beside] | None = None,
    ) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"train_data_dir: expected a folder, got {str(folder)!r}.")
        super().__init__(size_px)
        self.key = "label" if labels else "prompt"
        self.items: Sequence[tuple[Path | None, Any]]
        if plain:
            self.key, self.items = "", plain_paths(root)
        else:
            self.items = (
                labelled_paths(root, num_labels) if labels else FolderCaptions(root, column, beside)
            )
        if not self.items:
            raise ValueError(f"train_data_dir: expected images, got none in {root}.")

    def fingerprint(self) -> str:
        """sha256 of the images' paths, captions and sizes in bytes."""
        return list_digest(
            (*_place(path), text, _size(path), *((*_place(p), _size(p)) for p in further))
            for (path, text), further in zip(self.items, self._further(), strict=True)
        )

    def _further(self) -> Iterator[list[Path]]:
        for index in range(len(self)):
            files = self._files_beside(index)
            yield [path for paths in files.values() for path in paths]

    def _files_beside(self, index: int) -> dict[str, tuple[Path, ...]]:
        items = self.items
        return items.files_beside(index) if isinstance(items, FolderCaptions) else {}

    def __len__(self) -> int:
        return len(self.items)

    def condition(self, index: int) -> dict[str, Any]:
        return {self.key: self.items[index][1]} if self.key else {}

    def image_bytes(self, index: int, most: int = -1) -> tuple[bytes, str] | None:
        path = self.items[index][0]
        return None if path is None else file_bytes(path, most)

    def beside_bytes(self, index: int) -> dict[str, list[tuple[bytes, str]]]:
        files = self._files_beside(index)
        return {key: [file_bytes(path) for path in paths] for key, paths in files.items()}


def _place(path: Path | None) -> tuple[str, str] | tuple[None]:
    return (None,) if path is None else (path.parent.name, path.name)


def _size(path: Path | None) -> int:
    return path.stat().st_size if path is not None and path.is_file() else -1


class LabelFileDataset(Dataset[dict[str, Any]]):
    """Class labels only, one integer a line."""

    def __init__(self, labels: Iterable[int]) -> None:
        self.labels = array("q", labels)

    @classmethod
    def from_file(cls, path: str | Path, num_labels: int | None = None) -> LabelFileDataset:
        """Args: num_labels: of the model, where it is known.

        Errors: ValueError for an empty file, or a line that is no label of the model.
        """
        file, labels = LineFile(path), array("q")
        for number, line in file.numbered():
            try:
                labels.append(label_of(line, num_labels))
            except ValueError as err:
                raise ValueError(
                    f"{path}:{number}: {err}. Correct the line, or take it out."
                ) from err
        if not labels:
            raise ValueError(f"prompts_file: expected one class label a line, got none in {path}.")
        return cls(labels)

    def fingerprint(self) -> str:
        """sha256 of the labels."""
        return list_digest(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"label": self.labels[index]}
