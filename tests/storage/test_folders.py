"""A folder takes another's place all or nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stepdistill.core.stopping import Stopped
from stepdistill.storage.files import locked
from stepdistill.storage.folders import (
    LEDGER,
    aside_of,
    delete_made,
    old_of,
    refuse_written_on,
    replacing,
)


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


@pytest.mark.parametrize("name", ["out.tmp", "out.old", ".out.tmp", "out.lock"])
def test_a_users_folder_of_a_likely_name_stays(tmp_path, name) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    for text in ("one", "two"):
        written(tmp_path / "out", text)
    assert (tmp_path / name / "thesis.txt").read_text() == "mine"


def add(out: Path) -> None:
    (out / "note.txt").write_text("mine")


def add_deep(out: Path) -> None:
    (out / "part" / "note.txt").write_text("mine")


def change(out: Path) -> None:
    (out / "part" / "file.txt").write_text("ONE")  # of the same length


def link(out: Path) -> None:
    (out / "note.txt").symlink_to("/nowhere")


def forget(out: Path) -> None:
    (out / LEDGER).unlink()


@pytest.mark.parametrize("users", [add, add_deep, change, link, forget])
def test_a_folder_with_a_users_file_is_not_replaced(tmp_path, users) -> None:
    out = tmp_path / "out"
    written(out, "one")
    users(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    named = "note.txt" if users in (add, add_deep, link) else "part/file.txt"
    with pytest.raises(ValueError, match=f"output: expected a new folder.*{named}"):
        written(out, "two")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_folder_is_not_replaced(tmp_path, kind) -> None:
    (tmp_path / "there").mkdir()
    if kind == "file":
        (tmp_path / "out").write_text("mine")
    else:
        (tmp_path / "out").symlink_to(tmp_path / "there")
    with pytest.raises(ValueError, match=r"got .*out, which is none"):
        written(tmp_path / "out", "two")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Stopped, SystemExit])
def test_nothing_half_made_stays_of_what_a_signal_ends(tmp_path, stop) -> None:
    def ends() -> None:
        with replacing(tmp_path / "out") as aside:
            aside.mkdir()
            (aside / "file.txt").write_text("half")
            raise stop

    with pytest.raises(stop):
        ends()
    assert names(tmp_path) == []


def test_what_a_kill_left_is_cleared(tmp_path) -> None:
    aside_of(tmp_path / "out").mkdir()
    (aside_of(tmp_path / "out") / "half.txt").write_text("half")
    written(tmp_path / "out", "one")
    assert names(tmp_path) == ["out"]


def test_one_killed_between_its_renames_is_there_again(tmp_path) -> None:
    out = tmp_path / "out"
    written(out, "one")
    out.rename(old_of(out))

    def fails() -> None:
        with replacing(out):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert (out / "part" / "file.txt").read_text() == "one"


def test_a_folder_of_ours_goes_only_where_all_of_it_is_ours(tmp_path) -> None:
    out = tmp_path / "run"
    written(out / "pipeline", "one")
    (out / "log.jsonl").write_text("{}")
    (out / "pipeline" / "note.txt").write_text("mine")
    (out / "mine.md").write_text("mine")
    for left in ("mine.md, pipeline/note.txt", "pipeline/note.txt"):
        with pytest.raises(ValueError, match=f"but what stepdistill wrote, got {left}"):
            delete_made(out, ("log.jsonl", "pipeline/*"), "output_dir")
        (out / "mine.md").unlink(missing_ok=True)
    (out / "pipeline" / "note.txt").unlink()
    delete_made(out, ("log.jsonl", "pipeline/*"), "output_dir")
    assert not out.exists()
    delete_made(out, (), "output_dir")


def test_a_users_file_is_not_written_on(tmp_path) -> None:
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(ValueError, match=r"output_dir: expected a folder without report\.html"):
        refuse_written_on(tmp_path, ("table.md", "report.html"), "output_dir")
    refuse_written_on(tmp_path, ("table.md",), "output_dir")


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
