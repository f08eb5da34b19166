"""What a run was trained on, in a few words and one hash, for its record and its model card."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from stepdistill.data.hub import HubDataset, HubStream
from stepdistill.data.images import ImageFolderDataset, LabelFileDataset
from stepdistill.data.lines import LineFile
from stepdistill.data.pairs import PairDataset
from stepdistill.data.stream import PromptDataset
from stepdistill.data.tars import TarDataset


def data_facts(dataset: Any) -> dict[str, Any]:
    """{"source", "items", "sha256"}: class, length and a hash of what the dataset holds.

    Hashed: prompts or labels as they are; of images the paths, captions and sizes in bytes; of
    pairs the settings that made them; of tar shards names and sizes in bytes; of the `datasets`
    library what it says of itself. None for a dataset of the user's own class.
    """
    told: Any = None
    if isinstance(dataset, PromptDataset) and isinstance(dataset.prompts, LineFile):
        return _facts(dataset, dataset.prompts.sha256)
    if isinstance(dataset, PromptDataset):
        told = dataset.prompts
    elif isinstance(dataset, LabelFileDataset):
        told = dataset.labels
    elif isinstance(dataset, ImageFolderDataset):
        told = [
            (path.parent.name, path.name, text, path.stat().st_size) for path, text in dataset.items
        ]
    elif isinstance(dataset, PairDataset):
        told = [dataset.settings.fingerprint, dataset.num_pairs]
    elif isinstance(dataset, TarDataset):
        told = [(p.name, p.stat().st_size) for p in dataset.shards]
    elif isinstance(dataset, HubDataset | HubStream):
        told = dataset.told_by
    text = None if told is None else json.dumps(told, sort_keys=True, default=str)
    return _facts(dataset, None if text is None else hashlib.sha256(text.encode()).hexdigest())


def _facts(dataset: Any, sha256: str | None) -> dict[str, Any]:
    return {"source": type(dataset).__name__, "items": len(dataset), "sha256": sha256}
