"""Shards: safetensors files of rows, each written whole or not at all, and hashed row by row.

A shard holds tensors of one number of rows, and facts (JSON) in its header. Beside them lies a hash
of every row, all its tensors together, which is compared whenever the row is read: a flipped bit is
noticed at the price of hashing what is used. Pair sets, the cache of encoded prompts and latents,
and the features of an evaluation are folders of these.
"""

# Shapes: n rows.

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stepdistill.storage.files import one_line, write_atomic

HASH_BYTES = 16
_HASHES = "sha256"  # (n, HASH_BYTES) uint8
_HEADER = "shard"  # the one metadata key: the order of several is not kept, bytes would differ
_EARLIER = ("pairs", "facts")  # of files that hold facts alone and no hash


class BrokenShardError(ValueError):
    """A file that is not what was written; the message names it and says what is wrong."""


def _row_hash(row: Mapping[str, Tensor]) -> Tensor:
    sha = hashlib.sha256()
    for name, value in sorted(row.items()):
        sha.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        sha.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(sha.digest()[:HASH_BYTES]), dtype=torch.uint8)


def _facts_hash(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_shard(path: Path, tensors: Mapping[str, Tensor], facts: Any = None) -> None:
    """Write a shard of these rows; the same rows and facts give the same bytes.

    Args: tensors: (n, ...) each, of any device. facts: JSON.
    Errors: OSError where the disk is full or does not let us; no half file is left then.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    (rows,) = {len(value) for value in plain.values()}
    hashes = [_row_hash({name: value[i] for name, value in plain.items()}) for i in range(rows)]
    header = json.dumps({"facts": facts, "sha256": _facts_hash(facts)})
    # Not save_file: a kill would leave its own temporary file, under a random name.
    content = save({**plain, _HASHES: torch.stack(hashes)}, {_HEADER: header})
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


class Shard:
    """An open shard; reads what is asked for alone.

    Attributes: facts: of its header. layout: name -> (safetensors dtype, shape of a row).
    Errors: BrokenShardError for a file that is cut off, malformed, or of changed facts.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, framework="pt")
            header = self._file.metadata() or {}
            self._slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            shapes = {name: tuple(one.get_shape()) for name, one in self._slices.items()}
            counts = {shape[:1] for shape in shapes.values()}
            if len(counts) != 1 or counts == {()}:
                raise ValueError(f"tensors of {shapes}, not of one number of rows")
            told = json.loads(header.get(_HEADER, "null"))
            if told is None:
                earlier = (header[key] for key in _EARLIER if key in header)
                self.facts = json.loads(next(earlier, "null"))
            else:
                self.facts = told["facts"]
                if told["sha256"] != _facts_hash(self.facts):
                    raise ValueError("other facts than were written")
            hashed = _HASHES in shapes
            if hashed != (told is not None) or (hashed and shapes[_HASHES][1:] != (HASH_BYTES,)):
                raise ValueError("no hashes of its rows")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as err:
            raise BrokenShardError(
                f"{path}: expected a whole shard, got a truncated or changed file ({one_line(err)})"
            ) from err
        self._hashes = self._file.get_tensor(_HASHES) if hashed else None
        self._slices.pop(_HASHES, None)
        self.layout = {
            name: (self._slices[name].get_dtype(), shape[1:])
            for name, shape in shapes.items()
            if name != _HASHES
        }
        self._rows = int(counts.pop()[0])

    def __len__(self) -> int:
        return self._rows

    def column(self, name: str) -> Tensor:
        """(n, ...) of one name, not compared with the hashes."""
        return self._file.get_tensor(name)

    def row(self, index: int) -> dict[str, Tensor]:
        """Every tensor of a row. Errors: BrokenShardError where it is not as it was written."""
        found = {name: one[index].clone() for name, one in self._slices.items()}
        self._compare(index, found)
        return found

    def read(self) -> dict[str, Tensor]:
        """Every tensor, (n, ...). Errors: BrokenShardError where a row is not as it was written."""
        found = {name: self.column(name) for name in self._slices}
        for index in range(self._rows):
            self._compare(index, {name: value[index] for name, value in found.items()})
        return found

    def _compare(self, index: int, row: Mapping[str, Tensor]) -> None:
        if self._hashes is not None and not torch.equal(self._hashes[index], _row_hash(row)):
            raise BrokenShardError(
                f"{self.path}: expected row {index} as it was written, got another sha256"
            )
