"""What a run was trained on, in a few words and one hash, for its record and its model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from stepdistill.data.hub import HubDataset
from stepdistill.data.images import ImageFolderDataset, LabelFileDataset
from stepdistill.data.lines import LineFile
from stepdistill.data.stream import PromptDataset
from stepdistill.data.tars import TarDataset
from stepdistill.pairs.dataset import PairDataset


def data_facts(dataset: Any) -> dict[str, Any]:
    """{"source", "items", "sha256"}: class, length and a hash of what the dataset holds.

    Hashed: prompts or labels as they are; of images the paths, captions and sizes in bytes; of
    pairs the settings that made them; of tar shards names and sizes in bytes; of the `datasets`
    library what it says of itself. None for a stream and for a dataset of the user's own class.
    """
    told: Iterable[Any] | None = None
    if isinstance(dataset, PromptDataset):
        lines = dataset.prompts
        told = () if isinstance(lines, LineFile) else lines
    elif isinstance(dataset, LabelFileDataset):
        told = dataset.labels
    elif isinstance(dataset, ImageFolderDataset):
        told = (
            (path.parent.name, path.name, text, path.stat().st_size if path.is_file() else -1)
            for path, text in dataset.items
        )
    elif isinstance(dataset, PairDataset):
        told = (dataset.settings.fingerprint, dataset.num_pairs)
    elif isinstance(dataset, TarDataset):
        told = ((p.name, p.stat().st_size) for p in dataset.shards)
    elif isinstance(dataset, HubDataset):
        told = dataset.told_by
    sha256 = None if told is None else list_digest(told)
    if isinstance(dataset, PromptDataset) and isinstance(dataset.prompts, LineFile):
        sha256 = dataset.prompts.sha256
    return {"source": type(dataset).__name__, "items": len(dataset), "sha256": sha256}


def list_digest(values: Iterable[Any]) -> str:
    """sha256 of the values as a JSON list, which is never held."""
    sha, joint = hashlib.sha256(b"["), b""
    for value in values:
        sha.update(joint + json.dumps(value, sort_keys=True, default=str).encode())
        joint = b", "
    sha.update(b"]")
    return sha.hexdigest()
