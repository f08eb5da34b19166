"""A file is written whole; what a kill leaves is cleared by whoever writes there next."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path

import pytest
from support.faults import killed_at
from support.processes import fork, status_of

from stepdistill.storage import files
from stepdistill.storage.files import clear_left, temporary, write_text


def killed(path: Path, at: int) -> None:
    def work() -> None:
        killed_at(at)
        write_text(path, "new")

    assert status_of(fork(work)) < 0


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def of_another(path: Path, machine: str, pid: int) -> Path:
    left = temporary(path, of_writer=True)
    name = left.name.replace(f"{files._machine_mark()}-{os.getpid()}", f"{machine}-{pid}")
    assert name != left.name
    left.with_name(name).write_text("half")
    return left.with_name(name)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_kill_leaves_the_earlier_text_and_the_next_writer_clears_its_half(tmp_path, at) -> None:
    """Also where that one writes another file: names made of contents never come again."""
    (tmp_path / "a.json").write_text("old")
    killed(tmp_path / "a.json", at)
    assert (tmp_path / "a.json").read_text() == "old"
    left = [name for name in names(tmp_path) if name != "a.json"]
    assert len(left) == (at > 1)
    assert status_of(fork(partial(write_text, tmp_path / "b.json", "b"))) == 0
    assert names(tmp_path) == ["a.json", "b.json"]


def test_what_a_living_process_writes_stays(tmp_path) -> None:
    left = of_another(tmp_path / "a.json", files._machine_mark(), os.getppid())
    write_text(tmp_path / "b.json", "b")
    assert left.read_text() == "half"


@pytest.mark.parametrize(("days", "stays"), [(0.5, True), (1.5, False)])
def test_another_machine_s_is_cleared_once_it_is_a_day_old(tmp_path, days, stays) -> None:
    left = of_another(tmp_path / "a.json", "0" * 8, os.getpid())
    then = time.time() - days * 86400
    os.utime(left, (then, then))
    write_text(tmp_path / "b.json", "b")
    assert left.exists() == stays


def test_a_users_hidden_file_stays(tmp_path) -> None:
    for name in (".a.json.1.tmp", ".a.stepdistill-tmp", ".mine-1.stepdistill-tmp"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    write_text(tmp_path / "b.json", "b")
    assert names(tmp_path) == sorted([*before, "b.json"])


def test_two_at_once_write_the_file_whole(tmp_path) -> None:
    path = tmp_path / "a.json"

    def work(letter: str) -> None:
        for _ in range(50):
            write_text(path, letter * 10_000)

    assert [status_of(child) for child in [fork(partial(work, x)) for x in "ab"]] == [0, 0]
    assert path.read_text() in ("a" * 10_000, "b" * 10_000)
    assert names(tmp_path) == ["a.json"]


def test_whoever_begins_a_long_work_clears_what_was_left_since(tmp_path) -> None:
    """Once a process has written in a folder, its later writes do not look through it again."""
    write_text(tmp_path / "a.json", "a")
    killed(tmp_path / "b.json", 3)
    write_text(tmp_path / "c.json", "c")
    assert len(names(tmp_path)) == 3
    clear_left(tmp_path)
    assert names(tmp_path) == ["a.json", "c.json"]
