"""Where methods are compared: one teacher, its data and a judge; the demo's or a user's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.demo.recipes import Training
from stepdistill.trainers import TRAINER_OF, DistillationTrainer
from stepdistill.training.config import TrainConfig

from .students import Student

TEACHER_ROWS = "teacher_rows.json"
PAIRS_SECONDS = "pairs_seconds.json"
Plain = dict[str, Any]  # a row as JSON holds it, see table.Judged


class Ground(ABC):
    """One comparison's teacher, data, recipes and judge, all below the folder `out`."""

    threads: int | None = 1  # of torch in each run; None leaves it alone

    def __init__(self, out: Path) -> None:
        self.out = out

    @abstractmethod
    def prepare(self) -> None:
        """Make what is missing: data, pairs, and TEACHER_ROWS with the teacher's rows."""

    @abstractmethod
    def students(self, methods: Sequence[str], steps: Sequence[int] | None) -> list[Student]:
        """Who is compared. Errors: ValueError for an unknown method."""

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

    def trainer(
        self, training: Training, updates: int, run: Path, seed: int, saves: int = 0
    ) -> DistillationTrainer:
        """A trainer of that many updates in `run`, whose parent holds what it starts from.

        Args: saves: checkpoints on the way, from the newest of which it goes on.
        """
        settings = training.lasting(updates)
        method, options = settings.pop("method"), settings.pop("method_config", {})
        first = run.parent / "first"
        if training.starts_from == "student":
            settings["init_student_from"] = str(first)
        model = str(first / "pipeline") if training.starts_from == "model" else self.teacher()
        settings |= {"output_dir": str(run), "seed": seed, "disable_progress_bar": True}
        if saves:
            settings |= {
                "checkpointing_steps": max(1, updates // saves),
                "checkpoints_total_limit": 1,
                "resume_from_checkpoint": "latest",
            }
        return TRAINER_OF[method](
            model,
            TrainConfig(**settings),
            self.dataset(training),
            method=method,
            method_config=options,
        )
