"""A folder takes another's place all or nothing."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from support.faults import killed_at
from support.processes import fork, status_of

from stepdistill.cli._demo import RUN_FILES
from stepdistill.core.stopping import Stopped
from stepdistill.storage.files import locked
from stepdistill.storage.folders import (
    LEDGER,
    aside_of,
    delete_made,
    old_of,
    refuse_unlike,
    refuse_written_on,
    replacing,
    write_folder,
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


EARLIER = {
    "pipeline": ("model_index.json", "README.md", "unet/config.json", "tokenizer/merges.txt",
                 "unet/diffusion_pytorch_model.safetensors", "scheduler/x_scheduler.py"),
    "lora": ("pytorch_lora_weights.safetensors", "README.md", "scheduler/scheduler_config.json"),
}  # fmt: skip


def earlier(folder: Path, *names: str) -> dict[str, bytes]:
    for name in ("distillation.json", *names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"earlier {name}")
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", EARLIER)
def test_an_export_without_a_list_gives_its_place_and_stays(tmp_path, kind) -> None:
    """By names alone nobody knows whether its card was edited."""
    before = earlier(tmp_path / "out", *EARLIER[kind])
    with pytest.warns(UserWarning, match=r"what was there is now .*out\.aside"):
        written(tmp_path / "out", "two")
    written(tmp_path / "out", "three")
    assert names(tmp_path) == ["out", "out.aside"]
    assert contents(tmp_path / "out.aside") == before
    assert contents(tmp_path / "out")["part/file.txt"] == b"three"


@pytest.mark.parametrize("users", ["note.txt", ".env", "unet/deep/note.json", "unet/note.md"])
def test_one_without_a_list_that_holds_another_file_is_not_replaced(tmp_path, users) -> None:
    before = earlier(tmp_path / "out", *EARLIER["pipeline"], users)
    with pytest.raises(ValueError, match="output: expected a new folder"):
        written(tmp_path / "out", "two")
    assert (names(tmp_path), contents(tmp_path / "out")) == (["out"], before)


def test_an_earlier_folder_without_our_record_is_not_replaced(tmp_path) -> None:
    earlier(tmp_path / "out", *EARLIER["pipeline"])
    (tmp_path / "out" / "distillation.json").unlink()
    with pytest.raises(ValueError, match="output: expected a new folder"):
        written(tmp_path / "out", "two")


def test_a_file_that_came_while_we_wrote_stays(tmp_path) -> None:
    out = tmp_path / "out"
    written(out, "one")

    def while_we_write() -> None:
        with replacing(out) as aside:
            aside.mkdir()
            add(out)

    with pytest.warns(UserWarning, match=r"now .*out\.aside"):
        while_we_write()
    assert (tmp_path / "out.aside" / "note.txt").read_text() == "mine"


@pytest.mark.sampled("1", "5", "9", "13", "17", "21", "25", "29")
@pytest.mark.parametrize("at", range(1, 30, 2))
def test_a_kill_at_any_change_leaves_an_earlier_export_whole(tmp_path, at) -> None:
    """Put in place by the call after it, whichever change of the file system the kill came at."""
    before = earlier(tmp_path / "out", *EARLIER["lora"])

    def work() -> None:
        killed_at(at)
        written(tmp_path / "out", "two")

    status_of(fork(work))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written(tmp_path / "out", "two")
    assert names(tmp_path) == ["out", "out.aside"]
    assert contents(tmp_path / "out.aside") == before
    assert contents(tmp_path / "out")["part/file.txt"] == b"two"


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
            delete_made(out, ("log.jsonl",), "output_dir")
        (out / "mine.md").unlink(missing_ok=True)
    (out / "pipeline" / "note.txt").unlink()
    delete_made(out, ("log.jsonl",), "output_dir")
    assert not out.exists()
    delete_made(out, (), "output_dir")


@pytest.mark.parametrize("users", ["note.txt", "pipeline/note.txt", "checkpoint-1/note.txt"])
def test_a_run_folder_with_a_users_file_in_any_part_is_not_deleted(tmp_path, users) -> None:
    """The files of exports and checkpoints are known by their lists, not by where they lie."""
    out = tmp_path / "run"
    written(out / "pipeline", "one")
    write_folder(out / "checkpoint-1", {}, {"s": {"n": 1}})
    (out / "log.jsonl").write_text("{}")
    refuse_unlike(out, RUN_FILES, "output_dir")
    (out / users).write_text("mine")
    with pytest.raises(ValueError, match=f"but what stepdistill wrote, got {users}"):
        delete_made(out, RUN_FILES, "output_dir")
    assert (out / users).read_text() == "mine"


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
