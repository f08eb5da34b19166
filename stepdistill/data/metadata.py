"""Captions of an image folder: metadata.jsonl, metadata.csv, or a .txt file beside each image.
The first two may also name images to edit, to refer to or to be controlled by, and masks.

The first two as the imagefolder of the `datasets` library reads them, the last as kohya's trainers
do. All of it is looked at when the folder is opened, so that what is wrong has a file and a line.
"""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.core.types import CONDITIONING, MASK
from stepdistill.data.captions import LONGEST, Caption, caption_of, read_json, shown
from stepdistill.data.lines import LineFile, Packed, Rows
from stepdistill.data.paths import LeftOut, image_names
from stepdistill.reporting.values import counted

# What users call the two columns; the first that a row has counts.
FILE_COLUMNS = (
    *("file_name", "image", "file", "filename", "image_path", "path", "file_path"),
    *("edited_image", "target_image"),
)
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "edit_prompt", "instruction")
# Of what an item has beside the image that it becomes, likewise.
BESIDE_COLUMNS = {
    CONDITIONING: (
        *("conditioning_file_name", "conditioning_image", "cond_image", "control_image"),
        *("control_path", "control_file_path", "edit_image", "source_image", "input_image"),
        *("original_image", "reference_image", "conditioning"),
    ),
    MASK: ("mask_file_name", "mask_image", "mask_path", "mask"),
}

Item = tuple[Path | None, Caption]  # None: an item that has images beside, and none to become


@dataclass(frozen=True)
class Beside:
    """A further image of an item: its column's names, and whether every item has to have it."""

    names: tuple[str, ...]
    needed: bool


def beside_columns(
    fields: Mapping[str, bool], conditioning: str | None = None, mask: str | None = None
) -> dict[str, Beside]:
    """Key of an item's further image -> its column.

    Args: fields: see families.beside.fields_beside. conditioning, mask: names of the columns where
        they are none of BESIDE_COLUMNS.
    """
    given = {CONDITIONING: conditioning, MASK: mask}
    return {
        key: Beside(BESIDE_COLUMNS[key] if (name := given[key]) is None else (name,), needed)
        for key, needed in fields.items()
    }


class FolderCaptions(Rows[Item]):
    """(file, caption) of each image of a folder with captions, read as they are needed.

    Args: column: name of the captions; "text" is looked for by its other names too. beside: further
        images by their keys. The first row decides on those that an item need not have; with one to
        begin with, items need no image to become.
    Errors: ValueError where the folder has none of the three forms, for a row that is no object of
        a file's name and a caption, with another number of further images than the first, and for a
        file that is outside the folder or not there.
    """

    def __init__(
        self, root: Path, column: str = "text", beside: Mapping[str, Beside] | None = None
    ) -> None:
        self.root, self.beside = root, dict(beside or {})
        self._becomes: bool | None = None  # whether items have an image to become, once known
        self._counts: dict[str, int] = {}  # of each further image in the first row
        self._columns = CAPTION_COLUMNS if column == "text" else (column,)
        self.rows: LineFile | Packed
        lines, table = root / "metadata.jsonl", root / "metadata.csv"
        if lines.is_file() and table.is_file():
            raise ValueError(
                f"train_data_dir: expected one of {lines} and {table.name}, got both. Keep one."
            )
        if lines.is_file():
            self.rows = LineFile(lines, "train_data_dir")
            for number, text in self.rows.numbered():
                where = f"{lines}:{number}"
                self._check(where, self._row(text, where))
        elif table.is_file():
            self.rows = Packed(self._table(table))
        else:
            needed = [one.names[0] for one in self.beside.values() if one.needed]
            if needed:
                raise ValueError(
                    f"train_data_dir: expected {lines} with text and {' and '.join(needed)}, which "
                    "the model reads beside the prompt, got none. Write one."
                )
            self.beside, left_out = {}, LeftOut()
            self.rows = Packed(self._beside(left_out))
            if not self.rows:
                raise ValueError(
                    f"train_data_dir: expected {lines} with file_name and text, {table.name}, or "
                    "images with a .txt file beside each, got none."
                )
            left_out.tell(root)

    def _row(self, line: str | bytes, where: str) -> dict[str, Any]:
        text = line if isinstance(line, str) else line.decode()
        row: dict[str, Any] = read_row(text, where, "file_name and text")
        return row

    def _where(self, number: int) -> str:
        return f"{self.root / 'metadata.jsonl'}:{number}"

    def _item(self, row: Any, where: str) -> Item:
        """Errors: ValueError for a row without a file's name and a caption."""
        if self._becomes is None and isinstance(row, dict):
            self._first(row)
        becomes = self._becomes is not False
        further = (one.names for one in self.beside.values())
        columns = (*((FILE_COLUMNS,) if becomes else ()), self._columns, *further)
        values = row_values(row, where, columns)
        name, caption = (values if becomes else [None, *values])[:2]
        if becomes and not isinstance(name, str):
            raise ValueError(f"{where}: expected an object with a file's name, got {shown(name)}.")
        try:
            return None if name is None else self.root / name, caption_of(caption)
        except ValueError as err:
            raise ValueError(f"{where}: {err}. Write one, or take the line out.") from err

    def _first(self, row: dict[str, Any]) -> None:
        """Take from the first row which images items have."""
        self.beside = {
            key: one for key, one in self.beside.items() if one.needed or first_name(row, one.names)
        }
        self._becomes = CONDITIONING not in self.beside or first_name(row, FILE_COLUMNS) is not None

    def _files(self, row: dict[str, Any], where: str) -> dict[str, tuple[Path, ...]]:
        """A row's further images. Errors: ValueError for what names none, or not as many."""
        files = {}
        for key, one in self.beside.items():
            column = str(first_name(row, one.names))
            names = row[column] if isinstance(row[column], list) else [row[column]]
            if not names or not all(isinstance(name, str) and name for name in names):
                raise ValueError(
                    f"{where}: expected the name of a file, or a list of them, in {column}, got "
                    f"{shown(row[column])}. Correct it, or take the line out."
                )
            wanted = self._counts.setdefault(key, len(names))
            if len(names) != wanted:
                raise ValueError(
                    f"{where}: expected {counted(wanted, 'image')} in {column} as in the first row "
                    f"(batches have one shape), got {len(names)}. Train on each number apart."
                )
            files[key] = tuple(self.root / name for name in names)
        return files

    def _check(self, where: str, row: Any) -> Item:
        item = self._item(row, where)
        further = (path for paths in self._files(row, where).values() for path in paths)
        paths = (*further, *(() if item[0] is None else (item[0],)))
        check_files(self.root, ((where, path) for path in paths))
        return item

    def _table(self, file: Path) -> Iterator[bytes]:
        """Rows of a .csv file as JSON."""
        where = str(file)
        try:
            with file.open(encoding="utf-8-sig", newline="") as opened:
                reader = csv.DictReader(opened, strict=True)
                for row in reader:
                    where = f"{file}:{reader.line_num}"
                    row = {name: text for name, text in row.items() if name is not None}
                    _, caption = self._check(where, row)
                    name = row.get(str(first_name(row, FILE_COLUMNS)))
                    yield self._packed(name, caption, row)
        except (csv.Error, UnicodeDecodeError) as err:
            raise ValueError(
                f"{where}: expected a table as UTF-8 text with commas, got {err}. Save it anew."
            ) from err

    def _beside(self, left_out: LeftOut) -> Iterator[bytes]:
        """A row for each image with a .txt file of its name; others are left out."""
        for name in image_names(self.root, left_out):
            file = (self.root / name).with_suffix(".txt")
            if not file.is_file():
                left_out.add("without a .txt file beside them", name)
                continue
            data = file.read_bytes()
            try:
                text = data[: LONGEST + 1].removeprefix(BOM_UTF8).decode("utf-8")
                caption = caption_of(text) if len(data) <= LONGEST else caption_of(None)
            except ValueError as err:
                raise ValueError(
                    f"{file}: {err}. Write a caption as UTF-8 text, or take the image out."
                ) from err
            yield self._packed(name, caption)

    def _packed(
        self, name: str | None, caption: Caption, row: Mapping[str, Any] | None = None
    ) -> bytes:
        values = {self._columns[0]: caption} | ({} if name is None else {FILE_COLUMNS[0]: name})
        for one in self.beside.values():
            values[one.names[0]] = (row or {})[str(first_name(row or {}, one.names))]
        return json.dumps(values).encode()

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Item:
        """See Rows."""
        where = self._where(index + 1)
        return self._item(self._row(self.rows[index], where), where)

    def files_beside(self, index: int) -> dict[str, tuple[Path, ...]]:
        """Further images of an item, by their keys; several of one where its column is a list."""
        if not self.beside:
            return {}
        where = self._where(index + 1)
        return self._files(self._row(self.rows[index], where), where)

    def __iter__(self) -> Iterator[Item]:
        rows: Iterator[str | bytes] = iter(self.rows)
        for number, row in enumerate(rows, 1):
            yield self._item(self._row(row, self._where(number)), self._where(number))


def read_row(text: str, where: str, wanted: str) -> Any:
    """The value of a line of JSON. Errors: ValueError naming what was wanted of it."""
    try:
        return read_json(text)
    except ValueError as err:
        raise ValueError(f"{where}: expected an object with {wanted}, got {err}.") from err


def row_values(row: Any, where: str, columns: Sequence[Sequence[str]]) -> list[Any]:
    """The values of a row's columns, each by the first of its names that the row has.

    Errors: ValueError for a row without one, or that is no object.
    """
    names = [first_name(row, names) for names in columns] if isinstance(row, dict) else [None]
    if None in names:
        got = f"columns {sorted(row)[:9]}" if isinstance(row, dict) else shown(row)
        *most, last = (wanted[0] for wanted in columns)
        absent = {wanted[0] for wanted, name in zip(columns, names, strict=False) if name is None}
        further = [key for key, known in BESIDE_COLUMNS.items() if known[0] in absent]
        what = further[0] if further else "caption"
        raise ValueError(
            f"{where}: expected an object with {', '.join(most)} and {last}, got {got}. Name the "
            f"{what}'s column: --data.{what}_column."
        )
    return [row[name] for name in names]


def check_files(root: Path, files: Iterable[tuple[str, Path]]) -> None:
    """Errors: ValueError for a file (where it is named, its path) that is not there, or not inside
    the folder."""
    inside = root.resolve()
    for where, path in files:
        try:
            within, there = inside in path.resolve().parents, path.is_file()
        except (OSError, ValueError) as err:  # too long; with NUL, or half a character
            raise ValueError(
                f"{where}: expected a file's name, got {shown(str(path))}: "
                f"{type(err).__name__}. Correct it, or take the line out."
            ) from err
        if not within:
            raise ValueError(f"{where}: expected files inside {root}, got {path}.")
        if not there:
            raise ValueError(f"{where}: expected every file to exist, got no {path}.")


def first_name(row: Collection[str], names: Sequence[str]) -> str | None:
    """The first of the names that a row, or a list of columns, has."""
    return next((name for name in names if name in row), None)
