"""Captions of an image folder: metadata.jsonl, metadata.csv, or a .txt file beside each image.

The first two as the imagefolder of the `datasets` library reads them, the last as kohya's trainers
do. All of it is looked at when the folder is opened, so that what is wrong has a file and a line.
"""

from __future__ import annotations

import csv
import json
from codecs import BOM_UTF8
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stepdistill.data.captions import LONGEST, Caption, caption_of, read_json, shown
from stepdistill.data.lines import LineFile, Packed, Rows
from stepdistill.data.paths import LeftOut, image_names

# What users call the two columns; the first that a row has counts.
FILE_COLUMNS = ("file_name", "image", "file", "filename", "image_path", "path")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt")

Item = tuple[Path, Caption]


class FolderCaptions(Rows[Item]):
    """(file, caption) of each image of a folder with captions, read as they are needed.

    Args: column: name of the captions; "text" is looked for by its other names too.
    Errors: ValueError where the folder has none of the three forms, for a row that is no object of
        a file's name and a caption, and for a file that is outside the folder or not there.
    """

    def __init__(self, root: Path, column: str = "text") -> None:
        self.root = root
        self._columns = CAPTION_COLUMNS if column == "text" else (column,)
        self.rows: LineFile | Packed
        lines, table = root / "metadata.jsonl", root / "metadata.csv"
        if lines.is_file() and table.is_file():
            raise ValueError(
                f"train_data_dir: expected one of {lines} and {table.name}, got both. Keep one."
            )
        if lines.is_file():
            self.rows = LineFile(lines, "train_data_dir")
            self._check((f"{lines}:{n}", self._parse(t, n)) for n, t in self.rows.numbered())
        elif table.is_file():
            self.rows = Packed(self._table(table))
        else:
            left_out = LeftOut()
            self.rows = Packed(self._beside(left_out))
            if not self.rows:
                raise ValueError(
                    f"train_data_dir: expected {lines} with file_name and text, {table.name}, or "
                    "images with a .txt file beside each, got none."
                )
            left_out.tell(root)

    def _parse(self, line: str | bytes, number: int = 0) -> Item:
        where = f"{self.root / 'metadata.jsonl'}:{number}"
        text = line if isinstance(line, str) else line.decode()
        return self._item(read_row(text, where, "file_name and text"), where)

    def _item(self, row: Any, where: str) -> Item:
        """Errors: ValueError for a row without a file's name and a caption."""
        name, caption = row_values(row, where, (FILE_COLUMNS, self._columns))
        if not isinstance(name, str):
            raise ValueError(f"{where}: expected an object with a file's name, got {shown(name)}.")
        try:
            return self.root / name, caption_of(caption)
        except ValueError as err:
            raise ValueError(f"{where}: {err}. Write one, or take the line out.") from err

    def _check(self, items: Iterable[tuple[str, Item]]) -> None:
        check_files(self.root, ((where, path) for where, (path, _) in items))

    def _table(self, file: Path) -> Iterator[bytes]:
        """Rows of a .csv file as JSON."""
        where = str(file)
        try:
            with file.open(encoding="utf-8-sig", newline="") as opened:
                reader = csv.DictReader(opened, strict=True)
                for row in reader:
                    where = f"{file}:{reader.line_num}"
                    row = {name: text for name, text in row.items() if name is not None}
                    item = self._item(row, where)
                    self._check([(where, item)])
                    yield self._packed(row[str(first_name(row, FILE_COLUMNS))], item[1])
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

    def _packed(self, name: str, caption: Caption) -> bytes:
        return json.dumps({FILE_COLUMNS[0]: name, self._columns[0]: caption}).encode()

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Item:
        """See Rows."""
        return self._parse(self.rows[index], index + 1)

    def __iter__(self) -> Iterator[Item]:
        rows: Iterator[str | bytes] = iter(self.rows)
        return (self._parse(row, number) for number, row in enumerate(rows, 1))


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
        *most, last = (names[0] for names in columns)
        raise ValueError(
            f"{where}: expected an object with {', '.join(most)} and {last}, got {got}. Name the "
            "caption's column: --data.caption_column."
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
