"""Preferences: of two images of one prompt, which is the better.

As JSON lines of a prompt and two files, or as a dataset with Pick-a-Pic's columns. Everything but
the images is looked at when the data are opened, so that a pair without a winner has a line.
"""

# Shapes: H, W in px; images (3, H, W) in [-1, 1].

from __future__ import annotations

import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from stepdistill.data.captions import caption_of, label_of, shown
from stepdistill.data.decode import Size
from stepdistill.data.fingerprint import list_digest
from stepdistill.data.hub import Columns, undecoded
from stepdistill.data.lines import LineFile
from stepdistill.data.metadata import (
    CAPTION_COLUMNS,
    check_files,
    first_name,
    read_row,
    row_values,
)
from stepdistill.data.source import Source, decoded, file_bytes
from stepdistill.reporting.values import counted

IMAGES, LABEL = ("jpg_0", "jpg_1"), "label_0"  # Pick-a-Pic's: the first image's share of the win
TIE = 0.5


class Preferences(Source):
    """Pairs by number: an item's "image" was chosen over its "rejected" one, of the same size.

    Both have the name of their content (see Source.known), "content" and "rejected_content".
    """

    @abstractmethod
    def rejected_bytes(self, index: int) -> tuple[bytes, str]:
        """As `image_bytes`, of the image that lost."""

    def item(self, index: int, size: int | Size | None) -> dict[str, Any]:
        """See Source.item."""
        lost = decoded(self.rejected_bytes(index), size, self.known)
        names = {"image": "rejected", "content": "rejected_content"}
        return {**super().item(index, size), **{names[key]: lost[key] for key in lost}}


class PreferenceFile(Preferences):
    """JSON lines {text, chosen, rejected}, the images named from the file's folder on.

    Args: path: the file. size_px: see Source. key: what is told beside the images, "prompt",
        "label" (a column of that name) or "none". column: of the captions. num_labels: of the
        model, where it is known.
    Errors: ValueError for the first line without a prompt, a winner and a loser, or with an image
        that is not there, or outside the folder.
    """

    def __init__(
        self,
        path: str | Path,
        size_px: int | None,
        key: str = "prompt",
        column: str = "text",
        num_labels: int | None = None,
    ) -> None:
        super().__init__(size_px)
        self.lines, self.root = LineFile(path, "preferences_file"), Path(path).parent
        self.key, self._num_labels = key, num_labels
        captions = CAPTION_COLUMNS if column == "text" else (column,)
        self._texts = {"prompt": (captions,), "label": (("label",),), "none": ()}[key]
        if not self.lines:
            raise ValueError(f"preferences_file: expected a pair a line, got none in {path}.")
        for number, line in self.lines.numbered():
            where = f"{path}:{number}"
            _, *files = self._row(line, where)
            check_files(self.root, ((where, file) for file in files))

    def _row(self, line: str, where: str) -> tuple[Any, Path, Path]:
        """(what is told, the chosen image, the rejected one) of a line."""
        columns = (*self._texts, ("chosen",), ("rejected",))
        row = read_row(line, where, ", ".join(names[0] for names in columns))
        *texts, chosen, rejected = row_values(row, where, columns)
        named = all(isinstance(name, str) and name for name in (chosen, rejected))
        if not named or chosen == rejected:
            raise ValueError(
                f"{where}: expected two images, one chosen and one rejected, got {shown(chosen)} "
                f"and {shown(rejected)}: a pair without a winner. Take the line out."
            )
        try:
            value = None
            if texts:
                text, by_label = texts[0], self.key == "label"
                value = label_of(text, self._num_labels) if by_label else caption_of(text)
        except ValueError as err:
            raise ValueError(f"{where}: {err}. Correct it, or take the line out.") from err
        return value, self.root / chosen, self.root / rejected

    def _pair(self, index: int) -> tuple[Any, Path, Path]:
        return self._row(self.lines[index], f"{self.lines.path}: pair {index}")

    def __len__(self) -> int:
        return len(self.lines)

    def fingerprint(self) -> str:
        """sha256 of the lines and the images' sizes in bytes."""
        pairs = (self._pair(index)[1:] for index in range(len(self)))
        sizes = (f.stat().st_size if f.is_file() else -1 for pair in pairs for f in pair)
        return list_digest((self.lines.sha256, *sizes))

    def condition(self, index: int) -> dict[str, Any]:
        return {self.key: self._pair(index)[0]} if self._texts else {}

    def image_bytes(self, index: int, most: int = -1) -> tuple[bytes, str]:
        return file_bytes(self._pair(index)[1], most)

    def rejected_bytes(self, index: int) -> tuple[bytes, str]:
        return file_bytes(self._pair(index)[2])


class PreferenceRows(Preferences):
    """Rows of the `datasets` library with Pick-a-Pic's columns: a caption, jpg_0, jpg_1, label_0.

    label_0 is 1 where the first image won, 0 where the second did; ties (0.5) are left out, and
    their number is told.
    Args: see HubDataset; caption: its column, "text" is looked for by its other names too.
    Errors: ValueError where a column is not there, for the first row of another label, and where
        all are ties.
    """

    def __init__(
        self,
        rows: Any,
        size_px: int | None,
        caption: str = "text",
        key: str = "prompt",
        num_labels: int | None = None,
    ) -> None:
        super().__init__(size_px)
        names = rows.column_names
        absent = [name for name in (*IMAGES, LABEL) if name not in names]
        if absent:
            raise ValueError(
                f"dataset_name: expected Pick-a-Pic's columns {[*IMAGES, LABEL]}, got "
                f"{sorted(names)[:20]}. Rename yours so, or write --data.preferences_file."
            )
        if caption == "text":
            caption = first_name(names, CAPTION_COLUMNS) or caption
        text = (caption, key, rows.features, num_labels)
        self._images = [Columns(names, image, *text) for image in IMAGES]
        self._origin = (rows.info.dataset_name, rows.info.config_name, rows._fingerprint)
        self._numbers, self._second_won = _winners(rows)
        self._texts = None if key == "none" else rows.select_columns([caption])
        parts = [undecoded(rows, columns) for columns in self._images]
        self._rows = [part.select_columns([name]) for part, name in zip(parts, IMAGES, strict=True)]

    def __len__(self) -> int:
        return len(self._numbers)

    def fingerprint(self) -> str:
        """sha256 of the library's own hash of what the rows are and where they came from."""
        return list_digest(self._origin)

    def condition(self, index: int) -> dict[str, Any]:
        number = int(self._numbers[index])
        row = {} if self._texts is None else self._texts[number]
        return self._images[0].condition(row, f"row {number}")

    def _image(self, index: int, which: int) -> tuple[bytes, str]:
        number = int(self._numbers[index])
        named = self._images[which].image_bytes(self._rows[which][number], f"row {number}")
        assert named is not None, "the columns are there"
        return named

    def image_bytes(self, index: int, most: int = -1) -> tuple[bytes, str]:
        return self._image(index, int(self._second_won[index]))

    def rejected_bytes(self, index: int) -> tuple[bytes, str]:
        return self._image(index, 1 - int(self._second_won[index]))


def _winners(rows: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(numbers of the rows with a winner, whether it is the second image) and a word on ties."""
    values = rows.select_columns([LABEL])[:][LABEL]
    try:
        labels = np.asarray(values, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError) as err:
        raise ValueError(
            f"dataset_name: expected numbers in {LABEL} (1: the first image won; 0: the second; "
            f"{TIE}: a tie), got {shown(values[0])}."
        ) from err
    wrong = np.flatnonzero(~np.isin(labels, (0.0, TIE, 1.0)))
    if wrong.size:
        raise ValueError(
            f"dataset_name: expected {LABEL} of 1, 0 or {TIE} (a tie), got "
            f"{shown(values[int(wrong[0])])} in row {wrong[0]}: a pair without a winner. Filter "
            f"{counted(int(wrong.size), 'such row')} out."
        )
    numbers = np.flatnonzero(labels != TIE)
    if not numbers.size:
        raise ValueError(f"dataset_name: expected a pair with a winner, got {len(labels)} ties.")
    if numbers.size < labels.size:
        ties = counted(int(labels.size - numbers.size), "pair")
        warnings.warn(f"dataset_name: left out {ties} without a winner (ties).", stacklevel=3)
    return numbers, labels[numbers] == 0.0
