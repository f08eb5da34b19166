"""The features of an evaluation: whole shards alone count, and a changed one is made anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stepdistill.evaluation.store import Store


def filled(folder: Path) -> Store:
    store = Store.of(folder, "student_1", {"seed": 0}, count=5, size=2)
    for shard in store.missing():
        numbers = torch.arange(shard.start, shard.stop)
        store.write(shard, {"number": numbers, "x": numbers[:, None] / 7}, {"first": shard.start})
    return store


def test_all_images_come_back_in_order(tmp_path) -> None:
    store = filled(tmp_path)
    assert store.missing() == []
    tensors, facts = store.read()
    assert tensors["number"].tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(tensors["x"], torch.arange(5)[:, None] / 7)
    assert [fact["first"] for fact in facts] == [0, 2, 4]


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_shard_is_missing(tmp_path, damage) -> None:
    store = filled(tmp_path)
    path = sorted(store.folder.glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data if damage == "bit" else data[:-3])
    if damage == "gone":
        path.unlink()
    with pytest.raises(ValueError, match=path.name):
        store.read()
    assert store.missing() == [range(2, 4)]
    assert store.missing(rank=1, world_size=2) == [range(2, 4)]
    assert store.missing(rank=0, world_size=2) == []
    assert filled(tmp_path).read()[0]["number"].tolist() == [0, 1, 2, 3, 4]
