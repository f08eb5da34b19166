"""Lines of a text file by number, without holding the file: every 64th byte offset is kept.

One million prompts of a hundred bytes are 100 MB as text and 125 kB as offsets. Texts that are no
lines of one file are packed end to end.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, TypeVar, overload

T = TypeVar("T")
STRIDE = 64  # lines read for one; the price of an item is a read of some kilobytes


class Rows(Sequence[T]):
    """Rows by number, of which none is held as an object."""

    @abstractmethod
    def row(self, index: int) -> T:
        """Args: index: from 0, below the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(index % len(self))


class Packed(Rows[bytes]):
    """Byte strings end to end, and where each ends: as objects they would take 50 bytes more."""

    def __init__(self, values: Iterable[bytes]) -> None:
        self._ends, packed = array("Q"), bytearray()
        for value in values:
            packed += value
            self._ends.append(len(packed))
        self._packed = bytes(packed)

    def __len__(self) -> int:
        return len(self._ends)

    def row(self, index: int) -> bytes:
        """See Rows."""
        return self._packed[self._ends[index - 1] if index else 0 : self._ends[index]]


class LineFile(Rows[str]):
    """The lines of a UTF-8 text file that are not blank, without the space around them.

    A byte order mark before the first is left out.
    Attributes: sha256 of the lines as a JSON list, taken while the offsets are found.
    Errors: ValueError for a missing file, for bytes that are no UTF-8, or lines that end with a
        carriage return alone (it names the line), and where the file has changed since it was
        opened.
    """

    def __init__(self, path: str | Path, where: str = "prompts_file") -> None:
        self.path, self.where = Path(path), where
        if not self.path.is_file():
            raise ValueError(f"{where}: expected a text file, got {str(path)!r}.")
        self._offsets, self._count = array("q"), 0
        self._stamp = self._stat()
        sha = hashlib.sha256(b"[")
        with self.path.open("rb") as file:
            position, joint = 0, b""
            for number, raw in enumerate(file, 1):
                line = self._text(raw, number)
                if line:
                    if self._count % STRIDE == 0:
                        self._offsets.append(position)
                    sha.update(joint + encode_basestring_ascii(line).encode())  # as json.dumps
                    self._count, joint = self._count + 1, b", "
                position += len(raw)
        sha.update(b"]")
        self.sha256 = sha.hexdigest()

    def _text(self, raw: bytes, number: int) -> str:
        try:
            text = (raw.removeprefix(BOM_UTF8) if number == 1 else raw).decode("utf-8").strip()
        except UnicodeDecodeError as err:
            raise ValueError(
                f"{self.where}: expected UTF-8 text, got {err} in line {number} of {self.path}. "
                "Save the file as UTF-8."
            ) from err
        if "\r" in text:
            raise ValueError(
                f"{self.path}:{number}: expected lines that end with a line feed, got carriage "
                "returns alone. Save the file with Unix or Windows line ends."
            )
        return text

    def _stat(self) -> tuple[int, int]:
        told = self.path.stat()
        return told.st_size, told.st_mtime_ns

    def __len__(self) -> int:
        return self._count

    def row(self, index: int) -> str:
        """See Rows."""
        block, left = divmod(index, STRIDE)
        if self._stat() != self._stamp:
            raise ValueError(
                f"{self.where}: expected {self.path} to stay as it was when the run began, got a "
                "changed file. Start the run anew, or put the old file back."
            )
        with self.path.open("rb") as file:  # opened anew: workers would share one position
            file.seek(self._offsets[block])
            for number, raw in enumerate(file, 2 if self._offsets[block] else 1):  # 1: the first
                line = self._text(raw, number)
                if line:
                    if not left:
                        return line
                    left -= 1
        raise AssertionError("an offset past the last line")

    def __iter__(self) -> Iterator[str]:
        return (line for _, line in self.numbered())

    def numbered(self) -> Iterator[tuple[int, str]]:
        """(its number in the file, from 1; the line) of all."""
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = self._text(raw, number)
                if line:
                    yield number, line
