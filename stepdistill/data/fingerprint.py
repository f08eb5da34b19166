"""What a run was trained on, in a few words and one hash, for its record and its model card."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from stepdistill.data.images import ImageFolderDataset, LabelFileDataset
from stepdistill.data.pairs import PairDataset
from stepdistill.data.stream import PromptDataset


def data_facts(dataset: Any) -> dict[str, Any]:
    """{"source", "items", "sha256"}: class, length and a hash of what the dataset holds.

    Hashed: prompts or labels as they are; of images the paths, captions and sizes in bytes; of
    pairs the settings that made them. None for a dataset of the user's own class.
    """
    told: Any = None
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
    text = None if told is None else json.dumps(told, sort_keys=True, default=str)
    return {
        "source": type(dataset).__name__,
        "items": len(dataset),
        "sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
    }
