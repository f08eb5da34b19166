"""Several gloo processes forked from this one: no start, no imports, for what needs no Trainer."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch.distributed as dist


def forked(world: int, work: Callable[[int], None], folder: Path) -> list[int]:
    """Exit statuses by rank of work(rank) (minus the signal of one that was killed).

    Args: folder: an empty one, through which they find each other, with stderr as RANK.txt.
    """
    folder.mkdir(parents=True)
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _run(world, rank, work, folder)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _run(world: int, rank: int, work: Callable[[int], None], folder: Path) -> None:
    status = 1
    try:
        signal.alarm(120)  # one that hangs is killed
        sys.stderr = (folder / f"{rank}.txt").open("w")
        dist.init_process_group("gloo", f"file://{folder}/store", world_size=world, rank=rank)
        work(rank)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):  # told on a full disk
            sys.stderr.flush()
        os._exit(status)
