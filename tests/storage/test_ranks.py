"""Several processes refuse as one, whoever finds the mistake, and soon."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate import PartialState
from support.processes import forked_ranks, status_of

from stepdistill.storage import ranks
from stepdistill.storage.owner import owned
from stepdistill.storage.ranks import agreed, owned_by_first, refusing_together


def launched(work: Callable[[int], None], out: Path) -> list[str]:
    """What each of two processes, as a launcher would start them, says of its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in (0, 1):
        child = os.fork()
        if child == 0:
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update(place, ACCELERATE_USE_CPU="true")
            PartialState._reset_state()
            told = "passed"
            try:
                work(rank)
            except Exception as err:
                told = f"{type(err).__name__}: {err}"
                traceback.print_exc(file=sys.stderr)
            (out / str(rank)).write_text(told)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [(out / str(rank)).read_text() for rank in (0, 1)]


def test_one_that_refuses_before_the_group_exists_is_heard_at_once(tmp_path) -> None:
    def work(rank: int) -> None:
        with refusing_together():
            if rank == 1:
                raise ValueError("prompts_file: expected a text file, got 'p.txt'.")
            agreed(lambda: None)

    began = time.monotonic()
    line = "ValueError: process 1: prompts_file: expected a text file, got 'p.txt'."
    assert launched(work, tmp_path) == [line, line]
    assert time.monotonic() - began < 60


def test_what_all_refuse_is_said_as_one_would(tmp_path) -> None:
    def work(_rank: int) -> None:
        with refusing_together():
            raise TypeError("no")

    assert launched(work, tmp_path) == ["TypeError: no"] * 2


def test_after_the_checks_an_error_is_one_processs_own(tmp_path) -> None:
    def work(rank: int) -> None:
        with refusing_together():
            agreed(lambda: None)
            if rank == 1:
                raise ValueError("late")

    assert launched(work, tmp_path) == ["passed", "ValueError: late"]


@pytest.mark.full
def test_a_folder_that_another_writes_is_refused_by_all(tmp_path) -> None:
    folder = tmp_path / "run"

    def work(_rank: int) -> None:
        with owned_by_first(folder, "output_dir"):
            pass

    with owned(folder, "output_dir"):
        told = launched(work, tmp_path)
    assert told[0] == told[1]
    assert f"which process {os.getpid()} on" in told[0]
    assert launched(work, tmp_path) == ["passed", "passed"]


def test_another_filling_of_a_cache_is_waited_for(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ranks, "_WAIT_SECONDS", 0.02)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with owned(tmp_path, "cache_dir"):
            os.write(ready[1], b".")
            os.read(go[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        os.write(go[1], b".")

    with owned_by_first(tmp_path, "cache_dir", wait=say):
        os.waitpid(child, 0)
    assert len(said) == 1
    assert said[0].startswith("waiting: cache_dir: expected a folder that no other")


def test_alone_nothing_is_asked_of_anybody() -> None:
    assert agreed(lambda: 3) == [3]
    with pytest.raises(ValueError, match=r"^mine$"), refusing_together():
        raise ValueError("mine")


def test_processes_on_cpus_meet_as_accelerate_has_them(tmp_path) -> None:
    """Whoever makes the group first, Accelerate's state is of all of its processes."""

    def work(number: int) -> None:
        from accelerate import Accelerator

        agreed(lambda: number)
        accelerator = Accelerator()
        print(accelerator.process_index, accelerator.num_processes)

    children = forked_ranks(2, work, tmp_path)
    assert [status_of(child) for child in children] == [0, 0]
    said = [(tmp_path / f"rank{rank}.txt").read_text().split()[-2:] for rank in (0, 1)]
    assert said == [["0", "2"], ["1", "2"]]


@pytest.mark.parametrize(("asked", "cpu"), [("true", True), ("false", False)])
def test_whoever_asks_for_the_cpu_gets_it_beside_a_gpu(monkeypatch, asked, cpu) -> None:
    given = []
    monkeypatch.setenv("ACCELERATE_USE_CPU", asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: given.append(cpu))
    ranks.process_state()
    assert given == [cpu]
