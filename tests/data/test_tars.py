"""Tar shards by offsets: what is found in them, and what is refused."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from support.samples import COUNT, SHARDS, caption, number_of, png, tar_folder

from stepdistill.data import tars
from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.tars import TarDataset, expand_shards


def write(path: Path, **members: bytes) -> Path:
    """A tar of `name__ext` members."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            told = tarfile.TarInfo(name.replace("__", "."))
            told.size = len(data)
            tar.addfile(told, io.BytesIO(data))
    return path


def test_samples_come_in_the_shards_order(tmp_path) -> None:
    data = TarDataset(str(tar_folder(tmp_path)), None)
    assert len(data) == COUNT
    found = [(data[i]["prompt"], number_of(data[i]["image"])) for i in range(COUNT)]
    assert found == [(caption(i), i) for i in range(COUNT)]


def test_same_samples_as_webdataset(tmp_path) -> None:
    """The library's own reader is the judge of the format."""
    folder = tar_folder(tmp_path)
    data = TarDataset(str(folder), None)
    urls = [str(p) for p in sorted(folder.iterdir())]
    theirs = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")
    pairs = [(row["txt"], int(row["png"][0, 0, 0])) for row in theirs]
    assert pairs == [(data[i]["prompt"], number_of(data[i]["image"])) for i in range(len(data))]


@pytest.mark.parametrize("pattern", ["", "*.tar", "{0000..0003}.tar"])
def test_folder_glob_and_range(tmp_path, pattern) -> None:
    tar_folder(tmp_path)
    assert [p.name for p in expand_shards(f"{tmp_path}/{pattern}")] == [
        f"{i:04d}.tar" for i in range(len(SHARDS))
    ]


def test_nothing_and_missing_shards_are_refused(tmp_path) -> None:
    tar_folder(tmp_path)
    with pytest.raises(ValueError, match=r"tar_shards: expected plain \.tar.*0004\.tar"):
        expand_shards(f"{tmp_path}/{{0000..0004}}.tar")
    with pytest.raises(ValueError, match="got none"):
        expand_shards(f"{tmp_path}/*.zip")


def test_compressed_shards_are_refused(tmp_path) -> None:
    plain = write(tmp_path / "a.tar", a__png=png(1), a__txt=b"a")
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(ValueError, match=r"got .*b\.tar\.gz.*decompress"):
        TarDataset(str(tmp_path), None)
    (tmp_path / "b.tar.gz").rename(tmp_path / "b.tar")
    with pytest.raises(ValueError, match=r"b\.tar: expected a whole tar file"):
        TarDataset(str(tmp_path), None)


@pytest.mark.parametrize("left", [700, 1600, 2100])
def test_truncated_shards_are_refused(tmp_path, left) -> None:
    path = write(tmp_path / "a.tar", a__png=png(1) + b"\0" * 600, a__txt=b"x" * 600)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=r"a\.tar: expected a whole tar file.*Fetch it again"):
        TarDataset(str(path), None)


def test_json_captions_and_class_labels(tmp_path) -> None:
    told = json.dumps({"text": "a cat", "caption": "a dog", "kind": 4}).encode()
    one = str(write(tmp_path / "a.tar", x__png=png(1), x__json=told))
    two = str(write(tmp_path / "b.tar", x__jpg=png(2), x__cls=b"7\n"))
    assert TarDataset(one, None)[0]["prompt"] == "a cat"
    assert TarDataset(one, None, column="caption")[0]["prompt"] == "a dog"
    assert TarDataset(one, None, "label", "kind")[0]["label"] == 4
    assert TarDataset(two, None, "label")[0]["label"] == 7
    assert set(TarDataset(two, None, "none")[0]) == {"image", "content"}


@pytest.mark.parametrize(
    "members",
    [{"x__json": b"{"}, {"x__json": b"[]"}, {"x__json": b'{"text": {}}'}, {"x__txt": b"\xff"}, {}],
)
def test_a_broken_caption_is_a_corrupt_sample(tmp_path, members) -> None:
    data = TarDataset(str(write(tmp_path / "a.tar", x__png=png(1), **members)), None)
    with pytest.raises(CorruptItemError, match=r"a\.tar:0"):
        data[0]


def test_samples_without_an_image_are_left_out(tmp_path) -> None:
    path = write(tmp_path / "a.tar", a__txt=b"a", b__png=png(1), b__txt=b"b", note=b"x")
    with pytest.warns(UserWarning, match=r"left out 1 sample without an image \(a\)"):
        data = TarDataset(str(path), None)
    assert [data[i]["prompt"] for i in range(len(data))] == ["b"]


def test_names_that_leave_the_folder_are_only_names(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (("../../evil.png", png(1)), ("../../evil.txt", b"a")):
            told = tarfile.TarInfo(name)
            told.size = len(data)
            tar.addfile(told, io.BytesIO(data))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    data = TarDataset(str(path), None)
    assert [data[i]["prompt"] for i in range(len(data))] == ["a"]
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.tar"]


def test_an_index_is_made_once(tmp_path, monkeypatch) -> None:
    folder, kept = str(tar_folder(tmp_path / "tars")), tmp_path / "index"
    empty = write(tmp_path / "tars" / "9999.tar")
    before = TarDataset(folder, None, index_dir=kept)

    def refuse(path: Path) -> Any:
        raise AssertionError(f"{path} was walked again")

    monkeypatch.setattr(tars, "index_shard", refuse)
    after = TarDataset(folder, None, index_dir=kept)
    assert [after.condition(i) for i in range(COUNT)] == [before.condition(i) for i in range(COUNT)]
    write(empty, a__png=png(1), a__txt=b"a")
    with pytest.raises(AssertionError, match=r"9999\.tar was walked"):
        TarDataset(folder, None, index_dir=kept)
