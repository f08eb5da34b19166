"""Of several captions one is drawn: anew every epoch, alike after a resume, none left unused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.samples import png

from stepdistill.core.context import stable_seed
from stepdistill.data.captions import one_caption
from stepdistill.data.hub import HubDataset, HubStream, load_rows
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.stream import PromptDataset, sample_item, stream

COUNT, SEVERAL = 6, 4
CAPTIONS = [[f"{i} {k}" for k in range(SEVERAL)] for i in range(COUNT)]


def dataset_of(kind: str, folder: Path) -> Any:
    if kind == "prompts":
        return PromptDataset(CAPTIONS)
    if kind == "images":
        folder.mkdir(exist_ok=True)
        rows = []
        for i, told in enumerate(CAPTIONS):
            (folder / f"{i}.png").write_bytes(png(i))
            rows.append(json.dumps({"file_name": f"{i}.png", "text": told}))
        (folder / "metadata.jsonl").write_text("\n".join(rows))
        return ImageFolderDataset(folder, None)
    rows = datasets.Dataset.from_dict({"text": CAPTIONS})
    if kind == "rows":
        return HubDataset(rows, None, "image", "text")
    folder.mkdir(exist_ok=True)
    rows.to_parquet(str(folder / "train.parquet"))
    return HubStream(load_rows(str(folder), streaming=True), None, "image", "text", buffer=2)


@pytest.mark.parametrize("kind", ["prompts", "images", "rows", "stream"])
def test_one_is_drawn_for_each_sample_and_epoch(tmp_path, kind) -> None:
    data = dataset_of(kind, tmp_path / "d")
    epochs = 40
    whole = [raw["prompt"] for raw in islice(stream(data, 3, 7), epochs * COUNT // 3)]
    drawn = [text for texts in whole for text in texts]
    assert len(set(drawn)) == COUNT * SEVERAL  # every caption has been used
    for epoch in range(epochs):
        own = drawn[epoch * COUNT : (epoch + 1) * COUNT]
        assert sorted(int(text.split()[0]) for text in own) == list(range(COUNT))
    for position, text in enumerate(drawn[:10]):
        assert int(text.split()[1]) == stable_seed("caption", 7, position) % SEVERAL
    again = [raw["prompt"] for raw in islice(stream(data, 3, 7, start=5), 20)]
    assert again == whole[5:25]
    assert drawn != [t for raw in islice(stream(data, 3, 8), 80) for t in raw["prompt"]]


def test_the_first_item_has_one_caption() -> None:
    assert sample_item(PromptDataset(CAPTIONS))["prompt"] in CAPTIONS[0]


def test_a_prompt_of_another_type_is_told() -> None:
    with pytest.raises(ValueError, match=r"train_dataset: expected a caption .* got None"):
        one_caption({"prompt": None}, 0, 0)
    assert one_caption({"prompt": 3}, 0, 0) == {"prompt": 3}
    assert one_caption({"label": 3}, 0, 0) == {"label": 3}
