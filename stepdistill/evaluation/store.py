"""Features on disk, a shard of images in one whole file: a killed evaluation goes on, and any
number of processes fill the same folder.

Which process makes a shard changes nothing in it: images are keyed by their number alone. A folder
is named by a hash of all that its numbers depend on, so other settings never meet old shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.storage.files import write_atomic, write_text


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Eight hex digits over JSON settings."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Store:
    """Shards of `size` images, `count` in all, in `folder`."""

    folder: Path
    count: int
    size: int

    @classmethod
    def of(cls, root: Path, name: str, settings: Mapping[str, Any], count: int, size: int) -> Store:
        """The store of these settings below `root`; its folder holds them as settings.json."""
        facts = {**settings, "count": count, "shard_images": size}
        folder = root / f"{name}-{settings_hash(facts)}"
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(facts, indent=2, sort_keys=True, default=str) + "\n"
        write_text(folder / "settings.json", text, _aside())
        return cls(folder, count, size)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[range]:
        """Image numbers of the shards that this process has still to make."""
        shards = [
            range(first, min(first + self.size, self.count))
            for first in range(0, self.count, self.size)
        ]
        # Shared out before the finished ones are left out: all processes agree on whose is whose.
        own = shards[rank::world_size]
        return [shard for shard in own if not self._file(shard).is_file()]

    def write(self, shard: range, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """One whole file; tensors hold a row for each image of the shard."""
        plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        assert all(len(value) == len(shard) for value in plain.values())
        told = {"facts": json.dumps(dict(facts))}
        write_atomic(
            self._file(shard), lambda path: save_file(plain, path, metadata=told), _aside()
        )

    def read(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """(every tensor, all images in order; the shards' facts). Every shard must be there."""
        parts: dict[str, list[Tensor]] = {}
        facts: list[dict[str, Any]] = []
        for first in range(0, self.count, self.size):
            with safe_open(self._file(range(first, first)), framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    parts.setdefault(name, []).append(file.get_tensor(name))
                facts.append(json.loads(file.metadata()["facts"]))
        return {name: torch.cat(values) for name, values in parts.items()}, facts

    def _file(self, shard: range) -> Path:
        return self.folder / f"shard_{shard.start:07d}.safetensors"


def _aside() -> str:
    """A suffix of this process's own: several may write one file's same bytes."""
    return f".{os.getpid()}.tmp"
