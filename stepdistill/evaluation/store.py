"""Features on disk, a shard of images in one whole file: a killed evaluation goes on, and any
number of processes fill the same folder.

Which process makes a shard changes nothing in it: images are keyed by their number alone. A folder
is named by a hash of all that its numbers depend on, so other settings never meet old shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.storage.files import json_sha256, write_text
from stepdistill.storage.shard_files import BrokenShardError, Shard, write_shard


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Eight hex digits over JSON settings."""
    return json_sha256(settings)[:8]


def network_sha256(net: nn.Module) -> str:
    """A hash of a network's state: names, shapes and values."""
    sha = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        sha.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


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
        write_text(folder / "settings.json", text)
        return cls(folder, count, size)

    def missing(self, rank: int = 0, world_size: int = 1) -> list[range]:
        """Image numbers of the shards that this process has still to make."""
        shards = [
            range(first, min(first + self.size, self.count))
            for first in range(0, self.count, self.size)
        ]
        # Shared out before the finished ones are left out: all processes agree on whose is whose.
        share = shards[rank::world_size]
        return [shard for shard in share if not self._whole(shard)]

    def _whole(self, shard: range) -> bool:
        try:
            return len(Shard(self._file(shard)).read()) > 0
        except BrokenShardError:  # absent ones, too
            return False

    def write(self, shard: range, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """One whole file; tensors hold a row for each image of the shard."""
        assert all(len(value) == len(shard) for value in tensors.values())
        write_shard(self._file(shard), tensors, dict(facts))

    def read(self) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """(every tensor, all images in order; the shards' facts).

        Errors: ValueError naming a shard that is absent or broken.
        """
        shards = [
            Shard(self._file(range(first, first))) for first in range(0, self.count, self.size)
        ]
        parts = [shard.read() for shard in shards]
        names = dict.fromkeys(name for part in parts for name in part)
        tensors = {
            name: torch.cat([part[name] for part in parts if name in part]) for name in names
        }
        return tensors, [shard.facts for shard in shards]

    def _file(self, shard: range) -> Path:
        return self.folder / f"shard_{shard.start:07d}.safetensors"
