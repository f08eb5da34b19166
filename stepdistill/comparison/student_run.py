"""One run of a comparison: measures an update, trains, and judges on the way and at the end.

Time is seconds of one processor core (on CUDA: of the wall clock) in training alone: each run first
measures its own cost of an update (see cost; a tenth of the budget, not counted), then trains as
many updates as fill the budget, so that schedules end where they should and a busy machine changes
nothing. A recipe's first training
is inside the budget; checkpoints, judging and the teacher's pairs, made once and shared, are not,
and the pairs' time is stated.
On the way the student is judged as it is then, its average where it keeps one, at the step counts
that the grid reached so far allows. A killed run goes on from its newest checkpoint, bit for bit.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepdistill.config.recipes import Training
from stepdistill.reporting.values import counted
from stepdistill.storage.files import locked, read_json, write_text
from stepdistill.trainers import DistillationTrainer

from .best_students import keep_best
from .budget import Budget
from .cost import CLOCK, measure, train
from .progress import SAVES, Leg, Progress, shares, stops
from .runs import PLAN, Setups, result_file, results, setup_of
from .students import Student
from .teacher_setup import Plain, TeacherSetup

CURVE_POINTS = 4
ON_THE_WAY = ("steps", "frechet", "recall")  # what is kept of a row that is not the last


def run_student(
    setup: TeacherSetup,
    student: Student,
    seed: int,
    budget: Budget,
    points: int = CURVE_POINTS,
    keeps: bool = True,
) -> None:
    """Train, judge and export one student; its result file is written last, whole.

    Args: points: of its curve, the end included (see progress.shares); keeps: whether its exports
        stay where no other seed's are better (see kept).
    """
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    file = result_file(setup.out, student, seed)
    work = setup.out / "work" / f"{student.name}_seed{seed}"
    work.parent.mkdir(parents=True, exist_ok=True)
    # The run of a caller that was killed may still be at it: it is waited for.
    with locked(work):
        if file.is_file():
            return
        trainings = setup.trainings(student)
        progress = Progress.of(work, trainings)
        rows = _Run(setup, student, seed, work, progress, points).all(trainings, budget)
        content = {
            "updates": [leg.updates for leg in progress.legs],
            "cpu_seconds": progress.seconds,
            "seconds": budget.seconds,
            "seed": seed,
            "budget": str(budget),
            "clock": f"{CLOCK}, {counted(torch.get_num_threads(), 'thread')}",
            "data": trainings[-1].data,
            "settings": setup.digest(student),
            "terms": setup.terms(trainings[-1]),
            "curve": progress.curve,
            "rows": rows,
        }
        if keeps:
            keep_best(setup.out, results(setup.out), rows, lambda steps: exported(work, steps))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content) + "\n")
        shutil.rmtree(work)


def exported(work: Path, steps: int) -> Path:
    """Where the student's pipeline for that many steps is written."""
    return work / f"pipeline_{steps}"


class _Run:
    def __init__(
        self,
        setup: TeacherSetup,
        student: Student,
        seed: int,
        work: Path,
        progress: Progress,
        points: int,
    ) -> None:
        self.setup, self.student, self.seed = setup, student, seed
        self.work, self.progress, self.points = work, progress, points

    def all(self, trainings: Sequence[Training], budget: Budget) -> list[Plain]:
        """The rows of the finished student."""
        progress, before = self.progress, 0.0
        for index, training in enumerate(trainings):
            last = index + 1 == len(trainings)
            if index == len(progress.legs):
                progress.legs.append(Leg(self._updates(training, budget)))
                progress.save()
            leg = progress.legs[index]
            at = stops(shares(self.points), before, training.share, leg.updates, last)
            trainer = self._one(training, leg, self.work / ("last" if last else "first"), at)
            if not last and trainings[index + 1].starts_from == "model":
                shutil.rmtree(self.work / "first" / "pipeline", ignore_errors=True)
                trainer.export(self.work / "first" / "pipeline")
            before += training.share
        return self._judge(trainer, self.student.steps)

    def _updates(self, training: Training, budget: Budget) -> int:
        if budget.updates is not None:
            return max(1, round(training.share * budget.updates))
        seconds = training.share * (budget.seconds or 0.0)
        return measure(self.setup, training, self.work / "probe", seconds).updates_in(seconds)

    def _one(
        self, training: Training, leg: Leg, run: Path, at: dict[int, float]
    ) -> DistillationTrainer:
        """Train one training to its end, judging at `at` (see progress.stops)."""
        progress = self.progress
        progress.catch_up(leg, run)
        trainer = self.setup.trainer(training, leg.updates, run, self.seed, saves=SAVES)
        for stop in sorted({*at, leg.updates}):
            share = at.get(stop)
            due = share is not None and share < 1.0 and not progress.judged(share)
            if stop < leg.step or (stop == leg.step < leg.updates and not due):
                continue
            leg.seconds += train(trainer, stop)
            leg.step, leg.wall = trainer.step, trainer.seconds
            progress.save()
            if leg.step < stop:
                raise RuntimeError(
                    f"train: expected {counted(stop, 'update')}, got {leg.step}: the run ended "
                    "early."
                )
            if due:
                self._point(share or 0.0, trainer)
        return trainer

    def _point(self, share: float, trainer: DistillationTrainer) -> None:
        possible = [steps for steps in self.student.steps if _can_sample(trainer, steps)]
        rows = self._judge(trainer, possible)
        some = [{name: row[name] for name in ON_THE_WAY} for row in rows]
        done = sum(leg.step for leg in self.progress.legs)
        facts = {"share": share, "updates": done, "seconds": self.progress.seconds}
        self.progress.curve.append({**facts, "rows": some})
        self.progress.save()

    def _judge(self, trainer: DistillationTrainer, counts: Sequence[int]) -> list[Plain]:
        rows = []
        for steps in counts:
            folder = exported(self.work, steps)
            shutil.rmtree(folder, ignore_errors=True)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="export: training stopped at update")
                trainer.export(folder, steps)
            rows.append(self.setup.judge(self.student.recipe, steps, folder))
        return rows


def _can_sample(trainer: DistillationTrainer, steps: int) -> bool:
    """Whether the student, as trained so far, can be sampled in that many steps."""
    try:
        trainer.method.sampler_at(trainer.step, trainer.args.max_train_steps, steps)
    except ValueError:
        return False
    return True


def main(argv: Sequence[str], setups: Setups) -> None:
    """One run, in this process: OUT STUDENT SEED. What it failed of is the last line it writes."""
    out, raw, seed = Path(argv[0]), json.loads(argv[1]), int(argv[2])
    student = Student(raw["recipe"], tuple(raw["steps"]))
    try:
        plan: dict[str, Any] = read_json(out / PLAN, ("budget",))
        budget, points = Budget.parse(plan["budget"]), plan.get("curve_points", CURVE_POINTS)
        keeps = plan.get("keeps", True)
        run_student(setup_of(out, setups), student, seed, budget, points, keeps)
    except Exception as err:
        traceback.print_exc()
        sys.exit(f"{type(err).__name__}: {' '.join(str(err).split())}")
