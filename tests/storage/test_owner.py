"""One process writes a folder; who it is is said, and who has ended is nobody."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stepdistill.storage import owner
from stepdistill.storage.owner import lock_of, owned, refuse_owned


def in_a_child(work: Callable[[], object]) -> str:
    """What `work` was refused with in another process, or nothing."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except ValueError as err:
            os.write(write, str(err).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with os.fdopen(read) as told:
        return told.read()


def take(folder: Path, beside: bool = False) -> None:
    with owned(folder, "output_dir", beside):
        pass


def state(lock: Path, **changes: object) -> None:
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(json.dumps({**owner._me(), **changes}))


@pytest.mark.parametrize("beside", [False, True])
def test_a_second_process_is_told_who_writes(tmp_path, beside) -> None:
    folder = tmp_path / "run"
    with owned(folder, "output_dir", beside):
        told = in_a_child(lambda: take(folder, beside))
    assert told.startswith(
        f"output_dir: expected a folder that no other process writes, got {folder}"
    )
    assert f"process {os.getpid()} on " in told
    assert in_a_child(lambda: take(folder, beside)) == ""
    assert list(tmp_path.rglob("*lock*")) == []


def test_whoever_fails_before_writing_leaves_no_folder(tmp_path) -> None:
    with pytest.raises(ValueError, match="a mistake"), owned(tmp_path / "a" / "out", "output_dir"):
        raise ValueError("a mistake")
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    with owned(tmp_path / "mine" / "out", "output_dir"):
        (tmp_path / "mine" / "out" / "file").write_text("")
    with owned(tmp_path / "mine", "output_dir"):
        pass
    assert (tmp_path / "mine" / "out" / "file").exists()


def test_what_this_process_holds_is_its_own(tmp_path) -> None:
    with owned(tmp_path, "a"):
        take(tmp_path)
        assert "process" in in_a_child(lambda: take(tmp_path))


def test_a_fork_does_not_give_it_back(tmp_path) -> None:
    with owned(tmp_path, "a"):
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        assert lock_of(tmp_path).is_file()


def test_a_killed_owner_is_nobody(tmp_path) -> None:
    def killed() -> None:
        with owned(tmp_path, "a"):
            os.kill(os.getpid(), signal.SIGKILL)

    in_a_child(killed)
    assert lock_of(tmp_path).is_file()
    take(tmp_path)
    assert not lock_of(tmp_path).exists()


def test_one_that_waits_for_its_parent_to_look_has_ended(tmp_path) -> None:
    child = os.fork()
    if child == 0:
        with owned(tmp_path, "a"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    take(tmp_path)
    os.waitpid(child, 0)


def test_another_process_of_the_same_id_has_not_written(tmp_path) -> None:
    state(lock_of(tmp_path), pid=os.getppid(), started="1")
    take(tmp_path)


def test_a_living_one_is_not_taken_over(tmp_path) -> None:
    state(lock_of(tmp_path), pid=os.getppid(), started=owner.started(os.getppid()))
    with pytest.raises(ValueError, match=f"process {os.getppid()} on"):
        refuse_owned(tmp_path, "output_dir")
    with pytest.raises(ValueError, match="Wait until it has ended"):
        take(tmp_path)


def test_another_machines_is_told_with_how_to_remove_it(tmp_path) -> None:
    state(lock_of(tmp_path), host="elsewhere pid:[1]", pid=1)
    told = f"process 1 on elsewhere .*If it has ended, delete {lock_of(tmp_path)}"
    with pytest.raises(ValueError, match=told):
        take(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', '{"host": 3, "pid": []}'])
def test_a_broken_lock_is_nobodys_once_it_is_old(tmp_path, text) -> None:
    lock = lock_of(tmp_path)
    lock.write_text(text)
    with pytest.raises(ValueError, match="no other process writes"):
        take(tmp_path)
    os.utime(lock, (time.time() - 60,) * 2)
    take(tmp_path)


def test_a_live_lock_that_was_renamed_by_mistake_is_put_back(tmp_path) -> None:
    """Two take over an ended one's at once, and the first has done so already."""
    lock = lock_of(tmp_path)
    state(lock, pid=os.getppid(), started=owner.started(os.getppid()))
    before = lock.read_text()
    owner._take_away(lock)
    assert lock.read_text() == before
    assert len(list(tmp_path.iterdir())) == 1
