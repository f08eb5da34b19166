"""webdataset tar shards, read by an index of where each member's bytes lie.

A sample is the members that share a name up to its first dot: 0001.jpg with 0001.txt, or with
0001.json (a caption under a key), or with 0001.cls (a class label). Nothing is unpacked. The
webdataset library itself reads shards as streams, which neither resume in the middle of one nor
keep their shuffle buffer; with offsets every sample has a number, and an order is one of numbers.
"""

# Shapes: n samples of a shard.

from __future__ import annotations

import glob
import hashlib
import json
import tarfile
import warnings
from bisect import bisect_right
from codecs import BOM_UTF8
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stepdistill.data.captions import LONGEST, caption_of, label_of, read_json
from stepdistill.data.corrupt import TOLD, CorruptItemError
from stepdistill.data.decode import IMAGE_SUFFIXES
from stepdistill.data.fingerprint import list_digest
from stepdistill.data.order import EpochOrder
from stepdistill.data.source import Source
from stepdistill.reporting.values import counted
from stepdistill.storage.files import one_line, write_atomic, write_text

_CAPTIONS = (".txt", ".json", ".cls")
# Columns of an index: offset and bytes of the image, of the caption, and which caption it is.
_COLUMNS = 5
_UNTOLD = -1
_EMPTY = 128  # bytes of an array file without rows, which can't be mapped


def expand_shards(pattern: str) -> list[Path]:
    """The tar files of a folder, a glob or a numbered range such as "data/{0000..0099}.tar".

    Errors: ValueError where there is none, or one is compressed or missing.
    """
    head, brace, rest = pattern.partition("{")
    first, dots, last = rest.partition("}")[0].partition("..")
    if brace and dots and first.isdigit() and last.isdigit():
        tail, width = rest.partition("}")[2], len(first)
        names = [f"{head}{i:0{width}d}{tail}" for i in range(int(first), int(last) + 1)]
    elif Path(pattern).is_dir():
        names = [str(p) for p in Path(pattern).iterdir() if ".tar" in p.suffixes]
    else:
        names = glob.glob(pattern)
    shards = sorted(Path(name) for name in names)
    wrong = [p for p in shards if p.suffix != ".tar" or not p.is_file()]
    if not shards or wrong:
        raise ValueError(
            f"tar_shards: expected plain .tar files, got {str(wrong[0]) if wrong else 'none'} from "
            f"{pattern!r}. Name a folder, a glob or a range {{0000..0099}}; decompress .tar.gz."
        )
    return shards


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def index_shard(path: Path) -> tuple[NDArray[np.int64], list[str]]:
    """((n, 5) offsets and sizes, in the tar's order; names of samples without an image).

    Errors: ValueError for a file that is no whole tar.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                key, dot, _ = name.name.partition(".")
                if member.isreg() and key and dot:
                    kinds = samples.setdefault(str(name.parent / key), {})
                    kinds[name.suffix.lower()] = (member.offset_data, member.size)
            end = tar.offset
        if _read(path, end, tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError("no end-of-archive block: it was cut off")
    except (tarfile.TarError, OSError, ValueError, EOFError) as err:
        raise ValueError(f"{path}: expected a whole tar file, got {err}. Fetch it again.") from err
    rows, left_out = [], []
    for key, kinds in samples.items():
        image = next((kinds[kind] for kind in kinds if kind in IMAGE_SUFFIXES), None)
        captions = [i for i, kind in enumerate(_CAPTIONS) if kind in kinds]
        if image is None:
            left_out.append(key)
        elif captions:
            rows.append((*image, *kinds[_CAPTIONS[captions[0]]], captions[0]))
        else:
            rows.append((*image, 0, 0, _UNTOLD))
    return np.asarray(rows, dtype=np.int64).reshape(-1, _COLUMNS), left_out


def _save(path: Path, index: NDArray[np.int64]) -> None:
    with path.open("wb") as file:  # np.save would add a suffix to a path
        np.save(file, index)


class TarDataset(Source):
    """Images with captions (or class labels) in webdataset tar shards on a file system.

    Args: shards: see `expand_shards`. size_px: as for image folders. key: what is told beside an
        image: "prompt", "label" (.cls, or the column of .json) or "none". column: key of the
        caption in .json. window: samples that are shuffled together. index_dir: where indexes are
        kept, so that a shard is walked once; none keeps them in memory (40 bytes a sample).
    Errors: ValueError for missing, compressed or truncated shards, and where no sample is whole.
    """

    def __init__(
        self,
        shards: str,
        size_px: int | None,
        key: str = "prompt",
        column: str = "text",
        window: int = 4096,
        index_dir: str | Path | None = None,
        num_labels: int | None = None,
    ) -> None:
        super().__init__(size_px)
        self.key, self.column, self.window, self.num_labels = key, column, window, num_labels
        self.shards = expand_shards(shards)
        self._folder = None if index_dir is None else Path(index_dir)
        indexed = [self._index(path) for path in self.shards]
        self._indexes = [index for index, _ in indexed]
        left_out = [name for _, names in indexed for name in names]
        self._ends = list(accumulate(len(index) for index in self._indexes))
        if not len(self):
            raise ValueError(
                f"tar_shards: expected samples of an image and its caption, got none in {shards!r}."
            )
        if left_out:
            warnings.warn(
                f"tar_shards: left out {counted(len(left_out), 'sample')} without an image "
                f"({', '.join(left_out[:TOLD])}).",
                stacklevel=2,
            )

    def _index(self, path: Path) -> tuple[NDArray[np.int64], list[str]]:
        """The index of one shard: from the disk where it is there, mapped and not read."""
        if self._folder is None:
            return index_shard(path)
        stat = path.stat()
        facts = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        index_file, names = self._folder / f"tar-{name}.npy", self._folder / f"tar-{name}.json"
        if not (index_file.is_file() and names.is_file()):
            index, left_out = index_shard(path)
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(names, json.dumps(left_out))
            write_atomic(index_file, lambda p: _save(p, index))
        mapped: Literal["r"] | None = "r" if index_file.stat().st_size > _EMPTY else None
        return np.load(index_file, mmap_mode=mapped), json.loads(names.read_text())

    def fingerprint(self) -> str:
        """sha256 of the shards' names and sizes in bytes."""
        return list_digest((p.name, p.stat().st_size) for p in self.shards)

    def __len__(self) -> int:
        return self._ends[-1]

    def order(self, seed: int) -> EpochOrder:
        sizes = [len(index) for index in self._indexes]
        return EpochOrder(len(self), seed, sizes, self.window)

    def _row(self, index: int) -> tuple[Path, int, list[int]]:
        """(shard, number within it, its columns) of a sample."""
        shard = bisect_right(self._ends, index)
        number = index - (self._ends[shard - 1] if shard else 0)
        return self.shards[shard], number, self._indexes[shard][number].tolist()

    def condition(self, index: int) -> dict[str, Any]:
        if self.key == "none":
            return {}
        path, number, (_, _, offset, size, kind) = self._row(index)
        name = f"{path.name}:{number}"
        try:
            if kind == _UNTOLD or size > LONGEST:
                raise ValueError(f"{size:,} bytes" if size else "none")
            value: Any = _read(path, offset, size).removeprefix(BOM_UTF8).decode("utf-8")
            if _CAPTIONS[kind] == ".json":
                value = read_json(value)[self.column]
            if self.key == "label":
                return {"label": label_of(value, self.num_labels)}
            return {"prompt": caption_of(value)}
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise CorruptItemError(f"{name} (its {self.key}: {one_line(err)})") from err

    def image_bytes(self, index: int, most: int = -1) -> tuple[bytes, str]:
        path, number, (offset, size, _, _, _) = self._row(index)
        name = f"{path.name}:{number}"
        try:
            return _read(path, offset, min(size, most) if most >= 0 else size), name
        except OSError as err:
            raise CorruptItemError(name) from err
