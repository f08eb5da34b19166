"""Prompts by number from a file that is never held."""

from __future__ import annotations

import hashlib
import json
import tracemalloc

import pytest
from support.samples import caption, image_folder, png

from stepdistill.data.fingerprint import data_facts
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.lines import STRIDE, LineFile
from stepdistill.data.stream import PromptDataset, StreamSampler


def test_lines_are_those_of_the_text(tmp_path) -> None:
    lines = [f"  prompt {i} é 猫 " + "x" * (i % 300) for i in range(5 * STRIDE + 3)]
    text = "\n\n" + "\r\n \n".join(lines) + "\n\t\n"
    (tmp_path / "p.txt").write_bytes(text.encode())
    found, stripped = LineFile(tmp_path / "p.txt"), [line.strip() for line in lines]
    assert [found[i] for i in range(len(found))] == stripped
    assert list(found) == stripped
    assert found[-1] == stripped[-1]
    assert found[3:200:50] == stripped[3:200:50]
    with pytest.raises(IndexError):
        found[len(stripped)]


def test_hash_is_that_of_the_list(tmp_path) -> None:
    prompts = ['a "b"', "ç", "c\\d"]
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    from_file = data_facts(PromptDataset.from_file(tmp_path / "p.txt"))
    assert from_file == data_facts(PromptDataset(prompts))


def test_hash_of_an_image_folder_is_that_of_its_rows(tmp_path) -> None:
    data = ImageFolderDataset(image_folder(tmp_path / "in", count=3), None)
    rows = [("in", f"{i:02d}.png", caption(i), len(png(i))) for i in range(3)]
    assert data_facts(data)["sha256"] == hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert data.items[-1] == (tmp_path / "in" / "02.png", caption(2))
    assert [path.name for path, _ in data.items[:2]] == ["00.png", "01.png"]


def test_bytes_that_are_no_text_name_their_line(tmp_path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a\nb\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"prompts_file: expected UTF-8.*line 3 of .*p\.txt"):
        LineFile(tmp_path / "p.txt")


def test_a_file_that_changes_is_refused(tmp_path) -> None:
    (tmp_path / "p.txt").write_text("a\nb\n")
    found = LineFile(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_text("a\nbb\n")
    with pytest.raises(ValueError, match="to stay as it was"):
        found[1]


@pytest.mark.full
def test_memory_does_not_hold_the_prompts(tmp_path) -> None:
    """200,000 prompts are 20 MB of text; opened and streamed, Python holds a fiftieth."""
    path = tmp_path / "p.txt"
    path.write_text("".join(f"prompt {i} " + "x" * 88 + "\n" for i in range(200_000)))
    assert path.stat().st_size > 20e6
    tracemalloc.start()
    data = PromptDataset.from_file(path)
    sampler = iter(StreamSampler(len(data), 16, 0))
    read = [len(data[row]["prompt"]) for _ in range(100) for row in next(sampler)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(data) == 200_000
    assert min(read) > 90
    assert peak < 4e5
