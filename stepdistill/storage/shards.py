"""A folder that several processes write together: each its own shards, none the whole.

torch.distributed.checkpoint writes safetensors files with the offsets of their pieces as JSON in
their headers; each process hashes what it wrote, and the first one seals the folder once all have
told their hashes. An error of one is an error of all, and leaves no folder. All processes must see
one file system.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from stepdistill.storage.folders import aside_of, begin, fill, manifest_entries, not_written, seal
from stepdistill.storage.ranks import agreed

_Entries = dict[str, dict[str, Any]]


def write_shards(
    target: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Write a folder as `whole.write_folder` does; call on all processes.

    Args: tensors: folder name -> live tensors, DTensors or the same on every process.
    Errors: OSError on every process where one of them can't write, or has gone.
    """
    aside, rank = aside_of(target), dist.get_rank()

    def written() -> _Entries:
        entries = manifest_entries(aside, aside.glob(f"*/shard-{rank + 1:05d}-*"))
        return entries if rank else {**entries, **manifest_entries(aside, aside.glob("*.json"))}

    try:
        agreed(lambda: begin(target) if rank == 0 else None, (OSError,))
        for stem, state in tensors.items():
            place = str(aside / stem)
            writer = dcp.HuggingFaceStorageWriter(place, save_distributed=True)
            dcp.save(dict(state), storage_writer=writer)
        agreed(lambda: fill(aside, {}, documents) if rank == 0 else None, (OSError,))
        gathered = agreed(written, (OSError,))
        manifest = {name: entry for entries in gathered for name, entry in entries.items()}
        agreed(lambda: _sealed(target, manifest) if rank == 0 else None, (OSError,))
    except (OSError, RuntimeError, CheckpointException) as err:  # torch tells a lost peer so
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        why = str(err)
        if isinstance(err, CheckpointException):
            why = "; ".join(f"process {r}: {e}" for r, (e, _) in err.failures.items())
        raise not_written(target, why) from err


def _sealed(target: Path, manifest: _Entries) -> None:
    aside = aside_of(target)
    seen = {p.relative_to(aside).as_posix() for p in aside.rglob("*") if p.is_file()}
    if seen != set(manifest):
        raise OSError(
            f"files that not every process sees ({sorted(seen ^ set(manifest))[0]}): "
            "output_dir has to be on a file system that all machines share"
        )
    seal(target, manifest)
