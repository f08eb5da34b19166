"""Rows on disk by their content: the same bits back, few files open, nothing lost to a kill."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stepdistill.cache import tensors as cache
from stepdistill.cache.tensors import CacheWriter, TensorCache, content_key, missing_keys


def row(number: int, width: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    values = torch.randn(3, width, generator=generator)
    return {"embeds": values.bfloat16(), "mask": values[0] > 0, "pooled": values.double().sum()}


def filled(folder, numbers, shard_bytes: int = 200, width=lambda n: 4) -> TensorCache:
    writer = CacheWriter(TensorCache(folder), shard_bytes)
    for n in numbers:
        if content_key(n) not in writer:
            writer.add(content_key(n), row(n, width(n)))
    writer.flush()
    return writer.cache


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("width", [lambda n: 4, lambda n: 4 + n % 3], ids=["one", "three shapes"])
def test_rows_come_back_bit_for_bit(tmp_path, width) -> None:
    written = filled(tmp_path, range(50), width=width)
    for store in (written, TensorCache(tmp_path)):
        assert len(store) == 50
        assert all(same(store.get(content_key(n)) or {}, row(n, width(n))) for n in range(50))
        assert store.get(content_key(50)) is None


def test_shards_have_the_size_asked_for(tmp_path) -> None:
    size = cache.row_bytes(row(0))
    assert size == 16 + 16 + 3 * 4 * 2 + 4 + 8  # key, hash, values
    filled(tmp_path, range(50), shard_bytes=10 * size)
    rows = [len(load_file(path)["keys"]) for path in tmp_path.iterdir()]
    assert rows == [10] * 5


def test_memory_is_of_keys_and_few_open_shards(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "_OPEN", 3)
    filled(tmp_path, range(100))
    store = TensorCache(tmp_path)
    for n in range(100):
        store.get(content_key(n))
        assert len(store._handles) <= 3
    assert sum(a.nbytes for part in store._parts for a in part) == 100 * 24


def test_what_is_there_is_not_written_again(tmp_path) -> None:
    filled(tmp_path, range(30))
    before = sorted(tmp_path.iterdir())
    filled(tmp_path, [3, 7, 29])
    assert sorted(tmp_path.iterdir()) == before
    assert len(filled(tmp_path, [*range(20, 40), *range(35)])) == 40


@pytest.mark.parametrize("kept", [0, 20, -40])
def test_a_broken_shard_is_missing_and_made_anew(tmp_path, kept) -> None:
    filled(tmp_path, range(30))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    path = sorted(files)[1]
    path.write_bytes(files[path][:kept])
    with pytest.warns(UserWarning, match=rf"{path.name} is broken .* left out"):
        store = TensorCache(tmp_path)
    assert len(store) < 30
    with pytest.warns(UserWarning, match="broken"):
        filled(tmp_path, range(30))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_shard_of_a_flipped_bit_is_dropped_when_it_is_read_and_made_anew(tmp_path) -> None:
    filled(tmp_path, range(30))
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    path = next(path for path, data in files.items() if bytes_of(7) in data)
    data = bytearray(files[path])
    data[files[path].index(bytes_of(7))] ^= 1
    path.write_bytes(data)
    store = TensorCache(tmp_path)
    assert len(store) == 30
    with pytest.warns(UserWarning, match=rf"cache_dir: .*{path.name}: expected row .* made anew"):
        assert store.get(content_key(7)) is None
    assert not path.exists()
    assert len(store) == len(TensorCache(tmp_path)) < 30
    assert content_key(7) not in store
    assert all(same(store.get(content_key(n)) or row(n), row(n)) for n in range(30))
    assert same(filled(tmp_path, range(30)).get(content_key(7)) or {}, row(7))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def bytes_of(number: int) -> bytes:
    return row(number)["embeds"].contiguous().view(torch.uint8).numpy().tobytes()


def test_shards_of_an_earlier_version_are_read(tmp_path) -> None:
    filled(tmp_path, range(10))
    for path in tmp_path.iterdir():
        tensors = load_file(path)
        tensors.pop("sha256")
        save_file(tensors, path)
    store = TensorCache(tmp_path)
    assert all(same(store.get(content_key(n)) or {}, row(n)) for n in range(10))


def test_missing_are_counted_once(tmp_path) -> None:
    store = filled(tmp_path, range(10))
    assert missing_keys(store, (content_key(n) for n in [3, 12, 12, 9, 13])) == 2
    assert missing_keys(store, iter(())) == 0


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch) -> None:
    def full(*_args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cache_dir: .*No space left.*what is written stays"):
        filled(tmp_path, range(10))
    assert list(tmp_path.iterdir()) == []


def test_a_data_worker_gets_the_keys_alone(tmp_path) -> None:
    store = filled(tmp_path, range(10))
    store.get(content_key(1))
    copy = pickle.loads(pickle.dumps(store))
    assert not copy._handles
    assert copy.knows(1)
    assert not copy.knows(10)


def test_keys_that_agree_in_half_are_told_apart(tmp_path) -> None:
    writer = CacheWriter(TensorCache(tmp_path), 1)
    keys = [b"\xff" * 8 + bytes(7) + bytes([n]) for n in (0, 128, 255)]
    for n, key in enumerate(keys):
        writer.add(key, {"x": torch.tensor([n])})
    store = TensorCache(tmp_path)
    assert [int(store.get(key)["x"]) for key in keys] == [0, 1, 2]
    assert b"\xff" * 8 + bytes(7) + b"\x01" not in store


def test_words_sort_as_their_bytes() -> None:
    keys = np.random.default_rng(0).integers(0, 256, (50, 16), dtype=np.uint8)
    words = cache._words(keys)
    order = np.lexsort((words[:, 1], words[:, 0]))
    assert [keys[i].tobytes() for i in order] == sorted(key.tobytes() for key in keys)
