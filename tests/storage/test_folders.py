"""A folder takes another's place all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stepdistill.storage.files import locked
from stepdistill.storage.folders import old_of, replacing


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

    def fails() -> None:
        with replacing(tmp_path / "out") as aside:
            aside.mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert (tmp_path / "out" / "part" / "file.txt").read_text() == "one"
    assert names(tmp_path) == ["out"]


def test_at_no_instant_is_there_neither(tmp_path, monkeypatch) -> None:
    """Killed before either rename: the earlier folder, whole, by its name or put aside."""
    rename = os.replace
    for at, name in enumerate(("out", old_of(tmp_path / "out").name)):
        written(tmp_path / "out", "one")
        calls: list[object] = []

        def killed(*paths: Path, at: int = at, calls: list[object] = calls) -> None:
            if len(calls) == at:
                raise KeyboardInterrupt
            calls.append(rename(*paths))

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                written(tmp_path / "out", "two")
        assert (tmp_path / name / "part" / "file.txt").read_text() == "one"
    written(tmp_path / "out", "two")
    assert names(tmp_path) == ["out"]


def test_a_lock_is_one_holder_s_at_a_time(tmp_path) -> None:
    with locked(tmp_path / "work"), pytest.raises(TimeoutError):
        locked(tmp_path / "work").acquire(timeout=0.05)
    with locked(tmp_path / "work"):
        pass
