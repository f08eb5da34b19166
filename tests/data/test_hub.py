"""Sources of the `datasets` library: columns, folders, and what is said where one is wrong."""

from __future__ import annotations

import sys
from itertools import islice

import datasets
import pytest
from support.samples import COUNT, SHARDS, batches, caption, number_of, parquet_folder

from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.hub import HubDataset, HubStream, load_rows
from stepdistill.data.stream import provided_fields


@pytest.fixture(params=[False, True], ids=["rows", "stream"])
def streaming(request):
    return request.param


def opened(folder, streaming: bool, *columns: str, **options):
    found = load_rows(str(folder), streaming=streaming)
    return (HubStream if streaming else HubDataset)(found, None, *columns, **options)


def items(data):
    if isinstance(data, HubStream):
        return [data.decode(row) for row in data.rows()]
    return [data[i] for i in range(len(data))]


def test_images_with_captions(tmp_path, streaming) -> None:
    data = opened(parquet_folder(tmp_path), streaming, "image", "text")
    assert len(data) == COUNT
    pairs = sorted((item["prompt"], number_of(item["image"])) for item in items(data))
    assert pairs == [(caption(i), i) for i in range(COUNT)]


def test_without_an_image_column_prompts_are_read(tmp_path, streaming) -> None:
    data = opened(parquet_folder(tmp_path, images=False), streaming, "image", "text")
    assert provided_fields(data) == {"cond", "prompts"}
    assert sorted(item["prompt"] for item in items(data)) == [caption(i) for i in range(COUNT)]


def test_folder_of_save_to_disk(tmp_path, streaming) -> None:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", None, " "]})
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "d"))
    data = opened(tmp_path / "d", streaming, "image", "text")
    assert len(data) == 4
    if not streaming:
        assert [data[i] for i in (0, 1)] == [{"prompt": "a"}, {"prompt": "b"}]
        with pytest.raises(CorruptItemError, match="row 2"):
            data[2]
        with pytest.raises(CorruptItemError, match="row 3"):
            data[3]


def test_class_labels(tmp_path, streaming) -> None:
    datasets.Dataset.from_dict({"cls": [3, 1, 2]}).save_to_disk(str(tmp_path / "d"))
    data = opened(tmp_path / "d", streaming, "image", "cls", key="label")
    assert sorted(item["label"] for item in items(data)) == [1, 2, 3]


def test_images_alone(tmp_path, streaming) -> None:
    data = opened(parquet_folder(tmp_path), streaming, "image", "text", key="none")
    assert sorted(number_of(item["image"]) for item in items(data)) == list(range(COUNT))
    assert provided_fields(data) == {"x0"}


def test_a_missing_column_is_named(tmp_path, streaming) -> None:
    folder = parquet_folder(tmp_path)
    with pytest.raises(ValueError, match=r"caption_column: expected one of \['image', 'text'\]"):
        opened(folder, streaming, "image", "caption")
    with pytest.raises(ValueError, match="image_column: expected one of"):
        opened(folder, streaming, "picture", "text", key="none")


def test_what_is_not_there(tmp_path, streaming) -> None:
    parquet_folder(tmp_path)
    with pytest.raises(ValueError, match="dataset_name: expected a dataset with a split 'test'"):
        load_rows(str(tmp_path), split="test", streaming=streaming)
    with pytest.raises(ValueError, match="dataset_name: expected a dataset"):
        load_rows(str(tmp_path / "nowhere"), streaming=streaming)


def test_the_missing_library_is_named_with_its_command(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r'pip install "stepdistill\[datasets\]"'):
        load_rows("somewhere")


def test_a_stream_that_states_a_wrong_number_is_refused(tmp_path) -> None:
    data = opened(parquet_folder(tmp_path), True, "image", "text")
    for wrong in (SHARDS[2] + 1, SHARDS[2] - 1):
        data.shards = [*SHARDS[:2], wrong, *SHARDS[3:]]
        told = f"expected {wrong} rows in shard 2, got {SHARDS[2]} in epoch"
        with pytest.raises(ValueError, match=told):
            list(islice(batches(data, 2 * COUNT), 2 * COUNT))
