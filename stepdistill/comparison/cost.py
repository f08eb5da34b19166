"""What training costs: seconds of one processor core (on CUDA: of the wall clock), measured.

A sample is decoded and encoded the first time that it is read, and kept; later epochs are cheaper.
Methods that read many images would get fewer updates than their budget pays for if the dear first
ones stood for all of them, so both kinds are measured. So are the parts of a run whose updates do
different things, such as a warm start.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepdistill.config.recipes import Training
from stepdistill.trainers import DistillationTrainer

if TYPE_CHECKING:
    from .teacher_setup import TeacherSetup

SHARE = 0.1  # of the budget that measuring takes at most, but for two updates of each kind
MOST = 16  # updates of a kind
PLANNED = 1000  # of the run that is measured in little


ON_GPU = torch.cuda.is_available()
CLOCK = "by the wall clock" if ON_GPU else "of processor time"


def clock() -> float:
    """Seconds so far: of all threads of this process, whatever else the machine does, or (as no
    processor counts a GPU's time) of the wall clock where one works."""
    return time.perf_counter() if ON_GPU else time.process_time()


def train(trainer: DistillationTrainer, until: int | None = None, saves: bool = True) -> float:
    """Train on; the seconds that its updates took, without those of saving and of report pages.

    A signal that stopped it, saved, ends this process with its status.
    Args: saves: without, neither is made.
    """
    start = clock()
    with _apart(trainer, saves) as apart:
        trainer.train(until)
    if trainer.stop.preempted:
        sys.exit(trainer.stop.status)
    return clock() - start - sum(apart)


@contextmanager
def _apart(trainer: DistillationTrainer, saves: bool) -> Iterator[list[float]]:
    """The seconds within of what is the comparison's, not the method's: checkpoints and pages."""
    spent: list[float] = []

    def timed(make: Callable[[], Any]) -> Callable[[], Any]:
        def made() -> Any:
            start = clock()
            result = make() if saves else trainer.output_dir
            spent.append(clock() - start)
            return result

        return made

    trainer.save, trainer.log.report = timed(trainer.save), timed(trainer.log.report)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        del trainer.save, trainer.log.report  # the classes' own again


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


def measure(
    setup: TeacherSetup, training: Training, scratch: Path, seconds: float = math.inf
) -> Cost:
    """Of a training, by a short one in the folder `scratch`, which is removed.

    Args: seconds: the training's budget, a SHARE of which measuring may take.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    trainer = setup.trainer(training, PLANNED, scratch, seed=0)
    kinds = _kinds(trainer)
    limit = SHARE * seconds / (1 + len(kinds))
    unread, reads = _update(trainer, limit)
    known, later, mean_reads, each_read = trainer.feed.seen, 0.0, 0.0, 0.0
    for step, share in kinds:
        trainer.step = step
        cost, batches = _update(trainer, limit, known)
        if step == 0:
            each_read = max(0.0, unread - cost) / max(1, reads)
        later, mean_reads = later + share * cost, mean_reads + share * batches
    shutil.rmtree(scratch)
    later = max(later, 1e-6)
    epoch = _epoch(trainer, mean_reads * trainer.args.train_batch_size)
    return Cost(later + mean_reads * each_read, later, epoch)


def _kinds(trainer: DistillationTrainer) -> list[tuple[int, float]]:
    """(first update, share of the run) of each part whose updates have phases of their own."""
    parts = groupby(range(PLANNED), key=lambda step: [*trainer.method.phases(step)])
    steps = [[*part] for _, part in parts]
    return [(min(part[0], PLANNED - 2), len(part) / PLANNED) for part in steps]


def _update(
    trainer: DistillationTrainer, limit: float, known: int | None = None
) -> tuple[float, int]:
    """(seconds of an update, batches that it reads), of as many as `limit` seconds allow, but one
    at least, after one that is not counted: it sets up what the others use.

    Args: known: batches read before, which are read again; None reads on.
    """
    trainer.feed.seen = before = trainer.feed.seen if known is None else 0
    spent = max(train(trainer, trainer.step + 1, saves=False), 1e-6)
    reads = trainer.feed.seen - before
    count = min(MOST - 1.0, limit / spent - 1)
    if known is not None:
        trainer.feed.seen = 0
        count = min(count, known // max(1, reads))
    count = max(1, int(count))
    return train(trainer, trainer.step + count, saves=False) / count, reads


def _epoch(trainer: DistillationTrainer, samples: float) -> float:
    """Updates until all samples have been read; none is kept for ever where they are too many."""
    args, size = trainer.args, len(trainer.dataset or ())
    cached = min(trainer.batches.latents_kept, args.max_cached_prompts)
    return size / samples if size <= cached else math.inf
