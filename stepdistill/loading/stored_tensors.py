"""Tensors of a checkpoint, whoever saved them: whole in a safetensors file, or cut among several.

Shards are those of torch.distributed.checkpoint's HuggingFaceStorageWriter: safetensors files in a
folder, each with the offsets of its pieces as JSON in its header; nothing is pickled. Its reader
reads both kinds. Of each tensor it takes what the reading process holds, all of it or its own part
of a DTensor, however many processes wrote it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from stepdistill.loading.safe_files import check_safetensors


class _Only(FileSystem):
    """A file system of the files given."""

    def __init__(self, files: list[Path]) -> None:
        self._files = [str(path) for path in files]

    def ls(self, path: object) -> list[str]:
        return self._files


class StoredTensors:
    """What is stored as SOURCE.safetensors or in a folder SOURCE of shards.

    facts: name -> (shape of the whole tensor, dtype).
    Errors: ValueError for a missing or malformed file, and for shards that leave a part out.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        one = source.with_name(f"{source.name}.safetensors")
        files = sorted(source.glob("*.safetensors")) if source.is_dir() else [one]
        for path in files:
            check_safetensors(path)
        self._reader = dcp.HuggingFaceStorageReader(str(source))
        self._reader.fs = _Only(files)
        try:
            metadata = self._reader.read_metadata().state_dict_metadata
        except (KeyError, TypeError, ValueError) as err:
            raise self._malformed(f"none that can be read ({type(err).__name__}: {err})") from err
        self.facts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, stored in metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            held = sum(prod(chunk.sizes) for chunk in stored.chunks)
            if held != prod(stored.size):
                raise self._malformed(f"{held} of the {prod(stored.size)} numbers of {name}")
            self.facts[name] = (tuple(stored.size), stored.properties.dtype)

    def _malformed(self, what: str) -> ValueError:
        return ValueError(f"{self.source}: expected every shard of its tensors, got {what}.")

    def read_into(self, live: Mapping[str, Tensor]) -> None:
        """Fill tensors, or parts of them, of these names and shapes. Errors: ValueError."""
        try:  # each process alone reads what it needs, so none can hang on another
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                dcp.load(dict(live), storage_reader=self._reader, no_dist=True)
        except CheckpointException as err:
            failures = "; ".join(str(failure) for failure, _ in err.failures.values())
            raise self._malformed(f"an error ({' '.join(failures.split())[:300]})") from err
