"""Is a run that was killed at a random instant and resumed the run that was never interrupted?"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from stepdistill.trainers import DistillationTrainer
from support.faults import fork, status_of
from support.resume import differences, everything, updates_of
from support.runs import build_trainer


def tell_updates(trainer: DistillationTrainer, pipe: int) -> DistillationTrainer:
    """Write a byte to the pipe where an optimiser update begins."""
    going = trainer._update

    def told(*args: Any) -> None:
        os.write(pipe, b".")
        going(*args)

    trainer._update = told  # type: ignore[method-assign]
    return trainer


def kill_within(trainer: Any, update: int, seconds: float) -> None:
    """Run trainer() in a forked process; kill -9 that long after its `update`-th update began."""
    read, write = os.pipe()

    def work() -> None:
        os.close(read)
        tell_updates(trainer(), write).train()

    child = fork(work)
    os.close(write)
    begun = 0
    while begun <= update:
        told = os.read(read, 1)
        if not told:
            raise AssertionError(f"the run ended after {begun} updates with {status_of(child)}")
        begun += 1
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    status = status_of(child)
    os.close(read)
    # It may have come to its end in these seconds; then there is nothing to go on with.
    assert status in (0, -signal.SIGKILL), status


def killed_differs(
    case: str, teacher: Path, layout: str, folder: Path, seed: int = 0, **options: Any
) -> tuple[list[str], int, int]:
    """(differences, update in which it was killed, updates of the run) of one case.

    The instant is random: an update, and a moment within it and the saving after it.
    """
    options = {"max_train_steps": 4, "checkpointing_steps": 1, "ema_decay": 0.9, **options}
    whole = build_trainer(case, teacher, layout, folder / "whole", **options)
    total = updates_of(whole)
    began = time.monotonic()
    whole.train()
    pace = (time.monotonic() - began) / total
    expected = everything(whole)
    chance = random.Random(f"{seed} {case} {teacher.name} {layout} {folder.name}")
    update = chance.randrange(1, total)

    def killed(**more: Any) -> DistillationTrainer:
        return build_trainer(case, teacher, layout, folder / "killed", **options, **more)

    kill_within(killed, update, chance.random() * pace)
    again = killed(resume_from_checkpoint="latest")
    again.train()
    return differences(expected, everything(again)), update, total
