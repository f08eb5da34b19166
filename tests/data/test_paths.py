"""Paths of image folders, packed: the same files in the same order, in few bytes."""

from __future__ import annotations

import hashlib
import json
import pickle
import tracemalloc
from pathlib import Path

import pytest
from support.samples import png

from stepdistill.data.fingerprint import data_facts
from stepdistill.data.images import ImageFolderDataset, LabelFileDataset
from stepdistill.data.paths import PackedPaths, plain_paths


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(1))
    return folder


def test_plain_folders_have_the_order_of_sorted_paths(tmp_path) -> None:
    names = ("b.png", "a/z.PNG", "a.png", "a-b/c.jpg", "a/b/ü 猫.webp", "a/note.txt", "0.bmp")
    root = tree(tmp_path, *names)
    expected = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix != ".txt"]
    assert [path for path, label in plain_paths(root)] == expected
    assert len(ImageFolderDataset(root, None, plain=True)) == 6


def test_labels_go_with_their_files(tmp_path) -> None:
    root = tree(tmp_path, "10/b.png", "10/a.png", "2/c.png", "2/d/e.png", "2/readme.md", "7/.keep")
    data = ImageFolderDataset(root, None, labels=True)
    found = [(path.relative_to(root).as_posix(), label) for path, label in data.items]
    assert found == [("10/a.png", 10), ("10/b.png", 10), ("2/c.png", 2)]
    assert data.condition(2) == {"label": 2}
    assert data.image_bytes(0)[1] == "a.png"


def test_it_is_a_sequence(tmp_path) -> None:
    paths = PackedPaths(tmp_path, [("a", 0), ("bcd", None), ("e", 5)])
    assert [paths[i] for i in (0, -1, 1)] == [
        (tmp_path / "a", 0), (tmp_path / "e", 5), (tmp_path / "bcd", None)]  # fmt: skip
    assert paths[1:] == [(tmp_path / "bcd", None), (tmp_path / "e", 5)]
    assert list(pickle.loads(pickle.dumps(paths))) == list(paths)
    with pytest.raises(IndexError):
        paths[3]


def test_a_path_takes_its_name_and_twelve_bytes(tmp_path) -> None:
    tracemalloc.start()
    paths = PackedPaths(
        tmp_path, ((f"{i % 1000}/image_{i:07d}.png", i % 1000) for i in range(10**5))
    )
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(paths) == 10**5
    assert held < 10**5 * (21 + 12) * 1.15  # arrays grow by an eighth


def test_labels_of_a_file_keep_their_hash() -> None:
    """A resumed run compares what its data were."""
    facts = data_facts(LabelFileDataset([3, 1, 1000]))
    assert facts["sha256"] == hashlib.sha256(json.dumps([3, 1, 1000]).encode()).hexdigest()
