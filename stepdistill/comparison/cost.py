"""What training costs: seconds of one processor core (on CUDA: of the wall clock), measured.

A sample is decoded and encoded the first time that it is read, and kept; later epochs are cheaper.
Methods that read many images would get fewer updates than their budget pays for if the dear first
ones stood for all of them, so both kinds are measured.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stepdistill.config.recipes import Training
from stepdistill.trainers import DistillationTrainer

if TYPE_CHECKING:
    from .teacher_setup import TeacherSetup

WARM, FIRST, LATER = 6, 10, 30  # updates: not counted, of samples not read before, of those read


def clock() -> float:
    """Seconds so far: of this process's cores, or of the wall clock where a GPU works."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def train(trainer: DistillationTrainer, until: int | None = None) -> float:
    """Train on; the seconds that its updates took, without those of saving.

    A signal that stopped it, saved, ends this process with its status.
    """
    start = clock()
    with _saving_timed(trainer) as saving:
        trainer.train(until)
    if trainer.stop.preempted:
        sys.exit(trainer.stop.status)
    return clock() - start - sum(saving)


@contextmanager
def _saving_timed(trainer: DistillationTrainer) -> Iterator[list[float]]:
    """The seconds of each save within: checkpoints are the comparison's, not the method's."""
    spent, save = [], trainer.save

    def timed() -> Path:
        start = clock()
        try:
            return save()
        finally:
            spent.append(clock() - start)

    trainer.save = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        del trainer.save  # the class's own again


@dataclass(frozen=True)
class Cost:
    """Of one training's updates. first, later: seconds of an update whose samples were not read
    before, and of one whose samples were; epoch: updates until all samples have been read."""

    first: float
    later: float
    epoch: float

    def updates_in(self, seconds: float) -> int:
        """How many fill that time; at least one."""
        unread = seconds / self.first
        if unread > self.epoch:
            unread = self.epoch + (seconds - self.epoch * self.first) / self.later
        return max(1, round(unread))


def measure(setup: TeacherSetup, training: Training, scratch: Path) -> Cost:
    """Of a training, by a short one in the folder `scratch`, which is removed."""
    shutil.rmtree(scratch, ignore_errors=True)
    trainer = setup.trainer(training, WARM + FIRST + LATER, scratch, seed=0)
    train(trainer, WARM)
    first = train(trainer, WARM + FIRST) / FIRST
    read, spent, step = trainer.feed.seen, 0.0, trainer.step
    while step < WARM + FIRST + LATER:
        trainer.feed.seen = 0  # the same samples again
        end = min(step + WARM + FIRST, WARM + FIRST + LATER)
        spent += train(trainer, end)
        step = end
    shutil.rmtree(scratch)
    later = max(spent / LATER, 1e-6)
    each = read / (WARM + FIRST) * trainer.args.train_batch_size
    return Cost(max(first, later), later, _epoch(trainer, each))


def _epoch(trainer: DistillationTrainer, samples: float) -> float:
    """Updates until all samples have been read; none is kept for ever where they are too many."""
    args, size = trainer.args, len(trainer.dataset or ())
    kept = min(trainer.batches.latents_kept, args.max_cached_prompts)
    return size / samples if size <= kept else math.inf
