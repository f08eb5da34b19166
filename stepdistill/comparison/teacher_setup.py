"""Where methods are compared: one teacher, its data and a judge; the demo's or a user's."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stepdistill.config.files import method_class, method_config
from stepdistill.config.flags import explain
from stepdistill.config.recipes import Training
from stepdistill.config.run import TrainConfig
from stepdistill.core.method import MethodConfig
from stepdistill.trainers import DistillationTrainer, trainer_class

from .students import StepsServed, Student, students

TEACHER_ROWS = "teacher_rows.json"
PAIRS_SECONDS = "pairs_seconds.json"
Plain = dict[str, Any]  # a row as JSON holds it, see table.Judged


class TeacherSetup(ABC):
    """One comparison's teacher, data, recipes and judge, all below the folder `out`."""

    threads: int | None = 1  # of torch in each run; None leaves it alone
    only_claims = True  # whether a method is asked for the step counts it claims alone

    def __init__(self, out: Path) -> None:
        """reasons: lines by method about what its settings were chosen by, once they were asked
        for."""
        self.out = out
        self.reasons: dict[str, list[str]] = {}

    @abstractmethod
    def check(self, chosen: Sequence[Student]) -> None:
        """Errors: ValueError for what `prepare`, a judge or the trainings of these students would
        stumble over, before anything is made."""

    @abstractmethod
    def prepare(self, needs_pairs: bool) -> None:
        """Make what is missing: data, pairs, and TEACHER_ROWS with the teacher's rows."""

    @abstractmethod
    def steps_served(self, methods: Sequence[str]) -> dict[str, StepsServed]:
        """What each method can be asked for. Errors: ValueError for an unknown method."""

    @abstractmethod
    def trainings(self, student: Student) -> list[Training]:
        """What trains a student, in order."""

    @abstractmethod
    def dataset(self, training: Training) -> Any:
        """The data that a training reads."""

    @abstractmethod
    def teacher(self) -> str:
        """The teacher's folder or Hub id."""

    @abstractmethod
    def judge(self, label: str, steps: int, folder: Path) -> Plain:
        """The row of an exported pipeline."""

    def equipped(self, training: Training) -> Training:
        """The training with what its settings leave to the comparison: nothing."""
        return training

    def pairs_guidance(self) -> float:
        """The teacher's, where its pairs are made."""
        return 1.0

    def students(self, methods: Sequence[str], steps: Sequence[int] | None) -> list[Student]:
        """Who is compared. Errors: ValueError for an unknown method."""
        return students(self.steps_served(methods), steps, self.only_claims)

    def needs_pairs(self, chosen: Sequence[Student]) -> bool:
        """Whether one of these students learns from the teacher's pairs."""
        return any(one.data == "pairs" for student in chosen for one in self.trainings(student))

    def pairs_made(self, make: Callable[[], Any], clock: Callable[[], float]) -> None:
        """Call `make`, which goes on where it was stopped, until it has come to its end; the
        seconds of all calls are PAIRS_SECONDS."""
        done, part = self.out / PAIRS_SECONDS, self.out / f"{PAIRS_SECONDS}.part"
        if done.is_file():
            return
        before = json.loads(part.read_text()) if part.is_file() else 0.0
        start = clock()
        try:
            make()
        finally:
            part.write_text(json.dumps(before + clock() - start))
        os.replace(part, done)

    def configs(
        self, training: Training, updates: int, **ours: Any
    ) -> tuple[str, TrainConfig, MethodConfig]:
        """(method, its run's settings, its own) of a training of that many updates.

        Args: ours: settings laid over the training's. Errors: ValueError for wrong settings.
        """
        judged = {"validation_steps": 0}  # by the comparison, outside the budget
        settings = {**judged, **training.lasting(updates), "output_dir": str(self.out), **ours}
        method = settings.pop("method")
        options = method_config(method, settings.pop("method_config", {}))
        try:
            return method, TrainConfig(**settings), options
        except ValidationError as err:
            raise explain(err, TrainConfig, f"settings of {training.label}") from err

    def check_settings(self, student: Student) -> None:
        """Errors: ValueError naming the method whose settings are wrong, before it is trained."""
        try:
            for training in self.trainings(student):
                self.configs(training, 1000)
        except (ValueError, TypeError) as err:
            raise ValueError(f"methods: {student.recipe}: {err}") from err

    def digest(self, student: Student) -> str:
        """Of everything that is set for a student: two runs with one digest are one run."""
        plain = json.dumps([asdict(one) for one in self.trainings(student)], sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()

    def terms(self, training: Training) -> dict[str, str]:
        """What a reader compares methods by, where it is not the same for all."""
        method, args, options = self.configs(training, 1000)
        cls, ends = method_class(method), tuple[float, ...]()
        if cls.guidance_options:
            ends = cls.guidance_of(options)
        elif training.data == "pairs":
            ends = (self.pairs_guidance(),)
        return {
            "guidance": " to ".join(dict.fromkeys(f"{g:g}" for g in ends)) or "none",
            "batch size": str(args.train_batch_size * args.gradient_accumulation_steps),
            "student": args.tuning.student,
        }

    def trainer(
        self, training: Training, updates: int, run: Path, seed: int, saves: int = 0
    ) -> DistillationTrainer:
        """A trainer of that many updates in `run`, whose parent holds what it starts from.

        Args: saves: checkpoints on the way, from the newest of which it goes on.
        """
        training, first = self.equipped(training), run.parent / "first"
        ours: dict[str, Any] = {
            "output_dir": str(run),
            "seed": seed,
            "disable_progress_bar": True,
        }
        if training.starts_from == "student":
            ours["init_student_from"] = str(first)
        model = str(first / "pipeline") if training.starts_from == "model" else self.teacher()
        if saves:
            ours |= {
                "checkpointing_steps": max(1, updates // saves),
                "checkpoints_total_limit": 1,
                "resume_from_checkpoint": "latest",
            }
        method, args, _ = self.configs(training, updates, **ours)
        return trainer_class(method)(
            model,
            args,
            self.dataset(training),
            method=method,
            method_config=training.lasting(updates).get("method_config", {}),
        )
