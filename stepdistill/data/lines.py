"""Lines of a text file by number, without holding the file: every 64th byte offset is kept.

One million prompts of a hundred bytes are 100 MB as text and 125 kB as offsets.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, overload

STRIDE = 64  # lines read for one; the price of an item is a read of some kilobytes


class LineFile(Sequence[str]):
    """The lines of a UTF-8 text file that are not blank, without the space around them.

    Attributes: sha256 of the lines as a JSON list, taken while the offsets are found.
    Errors: ValueError for a missing file, for bytes that are no UTF-8 (it names the line), and
        where the file has changed since it was opened.
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
            return raw.decode("utf-8").strip()
        except UnicodeDecodeError as err:
            raise ValueError(
                f"{self.where}: expected UTF-8 text, got {err} in line {number} of {self.path}. "
                "Save the file as UTF-8."
            ) from err

    def _stat(self) -> tuple[int, int]:
        told = self.path.stat()
        return told.st_size, told.st_mtime_ns

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        block, left = divmod(index % self._count, STRIDE)
        if self._stat() != self._stamp:
            raise ValueError(
                f"{self.where}: expected {self.path} to stay as it was when the run began, got a "
                "changed file. Start the run anew, or put the old file back."
            )
        with self.path.open("rb") as file:  # opened anew: workers would share one position
            file.seek(self._offsets[block])
            for raw in file:
                line = self._text(raw, -1)
                if line:
                    if not left:
                        return line
                    left -= 1
        raise AssertionError("an offset past the last line")

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                line = self._text(raw, number)
                if line:
                    yield line
