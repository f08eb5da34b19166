"""Encoded prompts and latents on disk, by the hash of what was encoded; read one row at a time.

A folder holds the output of one encoder: shard-HASH.safetensors, in which rows of the same names,
shapes and dtypes are stacked beside their keys (see storage/shard_files.py). A shard's name is the
hash of its keys: a kill costs the shard in work, and the same prompts in the same order give the
same files. Shards are only ever added, but for a broken one, which is deleted and made anew.
"""

# Shapes: n rows of a shard, K keys of the folder.

from __future__ import annotations

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from stepdistill.storage.files import clear_left
from stepdistill.storage.shard_files import HASH_BYTES, BrokenShardError, Shard, write_shard

KEY_BYTES = 16
_KEYS, _VALUE = "keys", "value."
_FOLDER = "folder"  # a fact of a shard: what its rows were encoded with, by the folder's name
_OPEN = 32  # shards kept open: mapped files, so memory holds what is being read


_PARTS = 16
_Index = tuple[NDArray[np.uint64], NDArray[np.uint32]]  # keys (K, 2), (shard, row) (K, 2)


def content_key(content: Any) -> bytes:
    """16 bytes that name a prompt, a label, or an image by its own hash."""
    return hashlib.sha256(json.dumps(content).encode()).digest()[:KEY_BYTES]


def _words(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """(K, 2) of (K, 16) bytes, big-endian so that they sort alike."""
    return np.ascontiguousarray(keys).view(">u8").astype(np.uint64).reshape(-1, 2)


def _sorted(words: NDArray[np.uint64], places: NDArray[np.uint32]) -> _Index:
    order = np.lexsort((words[:, 1], words[:, 0]))
    return words[order], places[order]


class TensorCache:
    """The rows of a folder. Opening it reads the keys alone: 24 bytes of memory a row.

    Shards that are broken, or of another folder, are left out with a warning, and their rows count
    as missing: those cut off when the folder is opened, those of a changed row when it is read.
    Args: fits: whether rows of these shapes by name may be there; none takes all.
    """

    def __init__(
        self,
        folder: str | Path,
        fits: Callable[[Mapping[str, tuple[int, ...]]], bool] = bool,
    ) -> None:
        self.folder, self.fits = Path(folder), fits
        self._paths: list[Path] = []
        self._handles: OrderedDict[int, Shard] = OrderedDict()
        self._parts: list[_Index] = []  # each sorted; joined when they become many
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._read(path)
        self._join()

    def add(self, path: Path) -> None:
        """See a shard that was written after the folder was opened."""
        self._read(path)
        if len(self._parts) > _PARTS:
            self._join()

    def _read(self, path: Path) -> None:
        try:
            shard = Shard(path)
            keys = shard.column(_KEYS).numpy()
            if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
                raise ValueError(f"keys of {keys.dtype} {keys.shape}")
            values = {n: s for n, (_, s) in shard.layout.items() if n.startswith(_VALUE)}
            if not self.fits({name[len(_VALUE) :]: shape for name, shape in values.items()}):
                raise ValueError(f"rows of {values or 'nothing'}")
            facts = shard.facts or {}
            if facts.get(_FOLDER, self.folder.name) != self.folder.name:
                raise ValueError(f"a shard of {facts[_FOLDER]}")
        except (ValueError, AttributeError, SafetensorError) as err:
            warnings.warn(f"cache_dir: {path} is broken ({err}) and left out.", stacklevel=2)
            return
        rows = np.arange(len(keys), dtype=np.uint32)
        places = np.stack([np.full_like(rows, len(self._paths)), rows], axis=1)
        self._parts.append(_sorted(_words(keys), places))
        self._paths.append(path)

    def _join(self) -> None:
        words, places = zip(*self._parts, strict=True) if self._parts else ((), ())
        if words:
            self._parts = [_sorted(np.concatenate(words), np.concatenate(places))]

    def __len__(self) -> int:
        return sum(len(places) for _, places in self._parts)

    def _find(self, key: bytes) -> tuple[int, int] | None:
        """(shard, row) of a key."""
        high, low = (int.from_bytes(key[i : i + 8], "big") for i in (0, 8))
        for words, places in self._parts:
            at = int(np.searchsorted(words[:, 0], np.uint64(high)))
            while at < len(words) and int(words[at, 0]) == high:
                if int(words[at, 1]) == low:
                    return int(places[at, 0]), int(places[at, 1])
                at += 1
        return None

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def knows(self, content: str) -> bool:
        """Whether an image of that content (see `data.source`) is there."""
        return content_key(content) in self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": OrderedDict()}  # data workers open none

    def get(self, key: bytes) -> dict[str, Tensor] | None:
        """The row's tensors by name, or None where it is missing."""
        found = self._find(key)
        if found is None:
            return None
        shard, row = found
        try:
            if shard not in self._handles:
                self._handles[shard] = Shard(self._paths[shard])
                while len(self._handles) > _OPEN:
                    self._handles.popitem(last=False)
            self._handles.move_to_end(shard)
            tensors = self._handles[shard].row(row)
        except BrokenShardError as err:
            self._drop(shard, err)
            return None
        return {
            name[len(_VALUE) :]: value for name, value in tensors.items() if name.startswith(_VALUE)
        }

    def _drop(self, shard: int, why: BrokenShardError) -> None:
        """Delete a shard and forget its rows: who fills the cache next makes them anew."""
        warnings.warn(f"cache_dir: {why}. It is deleted, to be made anew.", stacklevel=3)
        self._handles.pop(shard, None)
        with suppress(OSError):  # a folder that we may not write: it stays, and is told of again
            self._paths[shard].unlink(missing_ok=True)
        for number, (words, places) in enumerate(self._parts):
            others = places[:, 0] != shard
            self._parts[number] = (words[others], places[others])


def row_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a row on disk, but for its share of the header."""
    return (
        KEY_BYTES
        + HASH_BYTES
        + sum(value.numel() * value.element_size() for value in tensors.values())
    )


class CacheWriter:
    """Adds rows to a cache, a shard whenever `shard_bytes` of one kind are gathered.

    Rows of different shapes go to different shards. Call `flush` at the end.
    """

    def __init__(self, cache: TensorCache, shard_bytes: int) -> None:
        self.cache, self.shard_bytes = cache, shard_bytes
        cache.folder.mkdir(parents=True, exist_ok=True)
        clear_left(cache.folder)
        self._waiting: dict[tuple[Any, ...], dict[bytes, Mapping[str, Tensor]]] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self.cache or any(key in rows for rows in self._waiting.values())

    def add(self, key: bytes, tensors: Mapping[str, Tensor]) -> None:
        row = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        kind = tuple((name, tuple(row[name].shape), row[name].dtype) for name in sorted(row))
        rows = self._waiting.setdefault(kind, {})
        rows[key] = row
        if len(rows) * row_bytes(row) >= self.shard_bytes:
            self._write(kind)

    def flush(self) -> None:
        """Write what is left."""
        for kind in list(self._waiting):
            self._write(kind)

    def _write(self, kind: tuple[Any, ...]) -> None:
        rows = self._waiting.pop(kind)
        joined = b"".join(rows)
        keys = np.frombuffer(joined, np.uint8).reshape(-1, KEY_BYTES).copy()
        tensors = {_KEYS: torch.from_numpy(keys)}
        for name, _, _ in kind:
            tensors[_VALUE + name] = torch.stack([row[name] for row in rows.values()])
        rows.clear()  # the stacked copy is enough
        name = hashlib.sha256(joined).hexdigest()[:32]
        path = self.cache.folder / f"shard-{name}.safetensors"
        try:
            write_shard(path, tensors, {_FOLDER: self.cache.folder.name})
        except (OSError, SafetensorError) as err:
            raise OSError(
                f"cache_dir: expected to write {path}, got {' '.join(str(err).split())}. Free some "
                "space and start again: what is written stays."
            ) from err
        self.cache.add(path)


def missing_keys(cache: TensorCache, keys: Iterable[bytes]) -> int:
    """Different keys that the cache lacks; 16 bytes of memory for each of them."""
    lacking = bytearray()
    for key in keys:
        if key not in cache:
            lacking += key
    words = _words(np.frombuffer(bytes(lacking), np.uint8).reshape(-1, KEY_BYTES))
    return len(np.unique(words, axis=0))
