"""What people's data look like: every input of data_inputs.py, read by value or told in one line.

Besides: shards of the cache and of pair sets that are not what was written.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from security.data_inputs import INPUTS, PAIRS
from support.samples import png

from stepdistill.cache.tensors import CacheWriter, TensorCache, content_key
from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.hub import HubDataset
from stepdistill.data.images import ImageFolderDataset, LabelFileDataset
from stepdistill.data.stream import PromptDataset
from stepdistill.data.tars import TarDataset
from stepdistill.pairs.dataset import PairDataset, PairWriter
from stepdistill.pairs.files import PairSettings
from stepdistill.storage.shard_files import write_shard

LABELS = 10


def prompts(folder: Path, content: bytes) -> Any:
    (folder / "p.txt").write_bytes(content)
    data = PromptDataset.from_file(folder / "p.txt")
    assert [data[i]["prompt"] for i in range(len(data))] == list(data.prompts)
    return list(data.prompts)


def of_list(folder: Path, content: list[Any]) -> Any:
    return PromptDataset(content).prompts


def labels(folder: Path, content: bytes) -> Any:
    (folder / "l.txt").write_bytes(content)
    return list(LabelFileDataset.from_file(folder / "l.txt", LABELS).labels)


def _folder(folder: Path, *names: str, **options: Any) -> ImageFolderDataset:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(1))
    return ImageFolderDataset(folder, None, **options)


def _items(data: ImageFolderDataset, folder: Path) -> list[Any]:
    items = [(path.relative_to(folder).as_posix(), told) for path, told in data.items]
    assert [(p.relative_to(folder).as_posix(), told) for p, told in data.items[:]] == items
    return items


def jsonl(folder: Path, content: bytes) -> Any:
    (folder / "metadata.jsonl").write_bytes(content)
    return _items(_folder(folder, "a.png", "b.png"), folder)


def table(folder: Path, content: bytes) -> Any:
    (folder / "metadata.csv").write_bytes(content)
    return _items(_folder(folder, "a.png", "b.png"), folder)


def beside(folder: Path, content: bytes) -> Any:
    (folder / "a.txt").write_bytes(content)
    ((name, told),) = _items(_folder(folder, "a.png"), folder)
    assert name == "a.png"
    return told


def _tar(folder: Path, suffix: str, content: bytes) -> Any:
    with tarfile.open(folder / "s.tar", "w") as tar:
        for name, data in (("0.png", png(1)), ("0" + suffix, content)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    key = "label" if suffix == ".cls" else "prompt"
    return TarDataset(str(folder / "s.tar"), None, key, num_labels=LABELS).condition(0)


def rows(folder: Path, content: list[Any], key: str = "prompt") -> Any:
    found = datasets.Dataset.from_dict({"text": content})
    data = HubDataset(found, None, "image", "text", key, LABELS)
    return [data[i] for i in range(len(data))]


def plain(folder: Path, names: list[str]) -> Any:
    return [name for name, _ in _items(_folder(folder, *names, plain=True), folder)]


def by_label(folder: Path, names: list[str]) -> Any:
    return _items(_folder(folder, *names, labels=True, num_labels=LABELS), folder)


KINDS: dict[str, Callable[[Path, Any], Any]] = {
    "prompts": prompts,
    "list": of_list,
    "labels": labels,
    "jsonl": jsonl,
    "csv": table,
    "txt": beside,
    "rows": rows,
    "row labels": lambda folder, content: rows(folder, content, "label"),
    "folder": plain,
    "label folder": by_label,
    **{f"tar {s}": lambda f, c, s=s: _tar(f, s, c) for s in (".txt", ".json", ".cls")},
}


@pytest.mark.parametrize(
    ("kind", "content", "expected"), INPUTS, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(INPUTS)]
)
def test_an_input_is_read_or_told_in_one_line(tmp_path, kind, content, expected) -> None:
    if not isinstance(expected, re.Pattern):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert KINDS[kind](tmp_path, content) == expected
        return
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            KINDS[kind](tmp_path, content)
            (line,) = [str(w.message) for w in told]
        except (ValueError, CorruptItemError) as err:
            line = str(err)
    assert expected.search(line), line
    assert "\n" not in line
    assert len(line) < 600


def test_two_forms_of_metadata_are_refused(tmp_path) -> None:
    for name in ("metadata.jsonl", "metadata.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"expected one of .*jsonl and metadata\.csv, got both"):
        _folder(tmp_path, "a.png")


def test_images_without_a_text_are_left_out_with_a_word(tmp_path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.txt").write_text("a cat")
    with pytest.warns(UserWarning, match=r"left out 1 picture .* without a \.txt .*\(b\.png\)"):
        data = _folder(tmp_path, "d/a.png", "b.png")
    assert _items(data, tmp_path) == [("d/a.png", "a cat")]


def test_a_folder_of_images_alone_is_refused_where_captions_are_needed(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"expected .*metadata\.jsonl with file_name and text, "):
        _folder(tmp_path, "a.png")


def test_the_caption_s_column_is_the_one_that_is_named(tmp_path) -> None:
    row = {"file_name": "a.png", "text": "short", "long": "a long caption"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    assert _items(_folder(tmp_path, "a.png", column="long"), tmp_path)[0][1] == "a long caption"
    with pytest.raises(ValueError, match=r"jsonl:1: .* with file_name and other, got columns"):
        _folder(tmp_path, "a.png", column="other")


# ------------------------------------------------------------------ pair sets
def pair_set(folder: Path) -> Path:
    settings = PairSettings("m", "", (1.0,), 1.0, 0, (2,), "h", 2, 2)
    PairWriter(folder, settings, 2).write(0, torch.ones(2, 2), torch.zeros(2, 2), ["a", "b"])
    assert PairDataset(folder)[1]["prompt"] == "b"
    return folder


@pytest.mark.parametrize(("keys", "value"), PAIRS, ids=str)
def test_a_manifest_of_other_values_is_refused(tmp_path, keys, value) -> None:
    path = pair_set(tmp_path) / "manifest.json"
    found = json.loads(path.read_text())
    inner = found if len(keys) == 1 else found["settings"]
    inner[keys[-1]] = value
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="expected"):
        PairDataset(tmp_path)


def shard(fingerprint: str, **changes: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """(tensors, facts) of the set's one shard, with changes."""
    tensors = {"noise": torch.ones(2, 2), "x0": torch.zeros(2, 2)}
    facts = {"fingerprint": fingerprint, "start": 0, "prompts": ["a", "b"]}
    for name, value in changes.items():
        target: Any = facts if name in facts else tensors
        target.pop(name, None)
        if value is not None:
            target[name] = value
    return tensors, facts


@pytest.mark.parametrize(
    "changes",
    [
        {"start": None},
        {"start": "0"},
        {"start": 2},
        {"prompts": None},
        {"prompts": "ab"},
        {"prompts": ["a"]},
        {"prompts": ["a", None]},
        {"prompts": [["a"], "b"]},
        {"noise": None},
        {"extra": torch.zeros(2, 1)},
        {"x0": torch.zeros(2, 3)},
        {"x0": torch.zeros(2, 2, dtype=torch.int64)},
        {"noise": torch.zeros(1, 2), "x0": torch.zeros(1, 2)},
    ],
    ids=lambda c: "-".join(c),
)
def test_a_shard_of_other_rows_is_refused(tmp_path, changes) -> None:
    """Whole by its own hashes, and not what its set is made of."""
    pair_set(tmp_path)
    fingerprint = PairSettings("m", "", (1.0,), 1.0, 0, (2,), "h", 2, 2).fingerprint
    write_shard(tmp_path / "shard-00000.safetensors", *shard(fingerprint, **changes))
    with pytest.raises(ValueError, match=r"shard-00000\.safetensors: expected pairs 0\.\.1"):
        PairDataset(tmp_path)


# ------------------------------------------------------------------ the cache
def filled(folder: Path, numbers: range = range(3), name: str = "x0") -> TensorCache:
    writer = CacheWriter(TensorCache(folder), 1 << 20)
    for n in numbers:
        writer.add(content_key(n), {name: torch.full((4, 2, 2), float(n))})
    writer.flush()
    return writer.cache


def latents_alone(shapes: Any) -> bool:
    return shapes.keys() == {"x0"}


@pytest.mark.parametrize("other", ["empty", "names", "folder"])
def test_a_shard_that_is_not_the_cache_s_own_is_left_out_and_made_anew(tmp_path, other) -> None:
    if other == "folder":
        filled(tmp_path / "b", range(5))
    elif other == "names":
        filled(tmp_path / "a", range(5), "embeds")
    else:
        (tmp_path / "a").mkdir()
        keys = torch.zeros(5, 16, dtype=torch.uint8)
        write_shard(tmp_path / "a" / "shard-0.safetensors", {"keys": keys})
    for path in (tmp_path / "b").glob("*"):
        (tmp_path / "a").mkdir(exist_ok=True)
        path.rename(tmp_path / "a" / path.name)
    with pytest.warns(UserWarning, match=r"shard-.*\.safetensors is broken .* left out"):
        store = TensorCache(tmp_path / "a", latents_alone)
    assert len(store) == 0
    assert store.get(content_key(1)) is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = CacheWriter(store, 1 << 20)
        writer.add(content_key(1), {"x0": torch.full((4, 2, 2), 1.0)})
        writer.flush()
        found = TensorCache(tmp_path / "a", latents_alone).get(content_key(1))
    assert found is not None
    assert torch.equal(found["x0"], torch.full((4, 2, 2), 1.0))


@pytest.mark.parametrize("tensor", ["keys", "value.x0", "sha256"])
def test_a_flipped_bit_is_named_and_dropped(tmp_path, tensor) -> None:
    filled(tmp_path)
    (path,) = tmp_path.glob("shard-*")
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    offsets = json.loads(data[8 : 8 + length])[tensor]["data_offsets"]
    data[8 + length + offsets[0]] ^= 1
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = TensorCache(tmp_path)
        found = [store.get(content_key(n)) for n in range(3)]
    assert None in found  # the damaged row is missing, so that it is made again
    for n, row in enumerate(found):
        assert row is None or torch.equal(row["x0"], torch.full((4, 2, 2), float(n)))
