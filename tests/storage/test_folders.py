"""A folder takes another's place all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stepdistill.storage.files import locked
from stepdistill.storage.folders import replacing


def written(target: Path, text: str) -> None:
    with replacing(target) as aside:
        (aside / "part").mkdir(parents=True)
        (aside / "part" / "file.txt").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_takes_the_place_of_the_earlier_one(tmp_path) -> None:
    for text in ("one", "two"):
        written(tmp_path / "out", text)
        assert (tmp_path / "out" / "part" / "file.txt").read_text() == text
        assert names(tmp_path) == ["out"]


def test_a_failure_leaves_the_earlier_one_alone(tmp_path) -> None:
    written(tmp_path / "out", "one")
    with pytest.raises(RuntimeError), replacing(tmp_path / "out") as aside:
        aside.mkdir()
        raise RuntimeError
    assert (tmp_path / "out" / "part" / "file.txt").read_text() == "one"
    assert names(tmp_path) == ["out"]


def test_at_no_instant_is_there_neither(tmp_path, monkeypatch) -> None:
    """Killed before each rename in turn: the earlier folder, whole, by its name or as NAME.old."""
    written(tmp_path / "out", "one")
    rename, calls = os.replace, []

    def killed(*paths) -> None:
        calls.append(paths)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        rename(*paths)

    for killed_at in (1, 2):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                written(tmp_path / "out", "two")
        there = [path for path in (tmp_path / "out", tmp_path / "out.old") if path.is_dir()]
        assert [(path / "part" / "file.txt").read_text() for path in there] == ["one"]
        if there[0].name == "out.old":
            there[0].rename(tmp_path / "out")
    written(tmp_path / "out", "two")
    assert names(tmp_path) == ["out"]


def test_a_lock_is_one_holder_s_at_a_time(tmp_path) -> None:
    with locked(tmp_path / "work"), pytest.raises(TimeoutError):
        locked(tmp_path / "work").acquire(timeout=0.05)
    with locked(tmp_path / "work"):
        pass
