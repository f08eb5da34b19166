"""Shards come back bit for bit; a flipped bit anywhere, a cut or a changed fact is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.storage.shard_files import BrokenShardError, Shard, write_shard

FACTS = {"prompts": ["a", "b", "четыре"], "start": 4}


def rows(seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(3, 2, 4, generator=draw),
        "half": torch.randn(3, 5, generator=draw).bfloat16(),
        "count": torch.tensor([3, 1, 2]),
        "flag": torch.tensor([True, False, True]),
    }


def written(folder: Path) -> Path:
    write_shard(folder / "shard.safetensors", rows(), FACTS)
    return folder / "shard.safetensors"


def noticed(path: Path) -> bool:
    try:
        shard = Shard(path)
        for index in range(len(shard)):
            shard.row(index)
    except BrokenShardError:
        return True
    return False


def test_rows_and_facts_come_back_bit_for_bit(tmp_path) -> None:
    shard = Shard(written(tmp_path))
    assert shard.facts == FACTS
    assert len(shard) == 3
    assert shard.layout["half"] == ("BF16", (5,))
    assert set(shard.layout) == set(rows())
    for index in range(3):
        found = shard.row(index)
        assert all(torch.equal(found[name], value[index]) for name, value in rows().items())
    assert all(torch.equal(shard.read()[name], value) for name, value in rows().items())


def test_the_same_rows_give_the_same_bytes_and_no_other_file(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    assert written(tmp_path).read_bytes() == written(tmp_path / "b").read_bytes()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["shard.safetensors"]


@pytest.mark.sampled("3")
@pytest.mark.parametrize("bit", range(0, 8, 3))
def test_any_flipped_bit_is_noticed(tmp_path, bit) -> None:
    path = written(tmp_path)
    data = path.read_bytes()
    for place in range(0, len(data), 1 if bit == 0 else 7):
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :])
        # What isn't hashed says nothing: blanks between JSON and tensors.
        assert noticed(path) or data[place] == ord(" "), place


def test_a_changed_row_is_found_when_it_is_read(tmp_path) -> None:
    path = written(tmp_path)
    data = bytearray(path.read_bytes())
    at = bytes(data).index(rows()["x"][1].numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    shard = Shard(path)
    shard.row(0)
    with pytest.raises(BrokenShardError, match="expected row 1 as it was written"):
        shard.row(1)
    with pytest.raises(BrokenShardError, match="row 1"):
        shard.read()


@pytest.mark.parametrize("kept", [0, 5, 40, -1])
def test_a_cut_file_is_refused_at_once(tmp_path, kept) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(BrokenShardError, match="truncated"):
        Shard(path)


def test_tensors_of_different_counts_are_refused(tmp_path) -> None:
    save_file({"x": torch.zeros(3, 2), "y": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(BrokenShardError, match="one number of rows"):
        Shard(tmp_path / "a.safetensors")


def test_taking_the_hashes_out_does_not_help(tmp_path) -> None:
    path = written(tmp_path)
    told = {"shard": json.dumps({"facts": None, "sha256": "x"})}
    tensors = load_file(path)
    save_file({name: tensors[name] for name in rows()}, path, told)
    with pytest.raises(BrokenShardError):
        Shard(path)


@pytest.mark.parametrize("key", ["pairs", "facts", None])
def test_files_of_earlier_versions_are_read(tmp_path, key) -> None:
    path = tmp_path / "a.safetensors"
    save_file(rows(), path, {key: json.dumps(FACTS)} if key else None)
    shard = Shard(path)
    assert shard.facts == (FACTS if key else None)
    assert torch.equal(shard.row(2)["x"], rows()["x"][2])
    assert set(shard.read()) == set(rows())


def test_a_full_disk_leaves_no_half(tmp_path, monkeypatch) -> None:
    def full(*_args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path)
    assert not list(tmp_path.iterdir())
