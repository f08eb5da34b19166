"""One run: judged on the way, resumed where a kill left it, its cost measured once."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.faults import fork, status_of
from support.runs import teacher_dir

from stepdistill.cli.compare import setups
from stepdistill.comparison import cost, student_run
from stepdistill.comparison.best_students import best_student_folder
from stepdistill.comparison.budget import Budget
from stepdistill.comparison.cost import Cost
from stepdistill.comparison.progress import Leg, Progress, shares, stops
from stepdistill.comparison.runs import result_file
from stepdistill.comparison.student_run import run_student
from stepdistill.comparison.students import StepsServed, Student
from stepdistill.comparison.teacher_setup import TeacherSetup
from stepdistill.config.recipes import Training
from stepdistill.data.stream import PromptDataset
from stepdistill.trainers import DistillationTrainer

STUDENT = Student("tiny", (1, 2))
SLOW = pytest.mark.full


class Tiny(TeacherSetup):
    """Two trainings of a tiny student; the judge tells weights apart, not how good they are."""

    def __init__(self, out: Path, teacher: Path) -> None:
        super().__init__(out)
        self._teacher = teacher

    def check(self, chosen: Any) -> None: ...

    def prepare(self, needs_pairs: bool) -> None: ...

    def steps_served(self, methods: Any) -> dict[str, StepsServed]:
        return {STUDENT.recipe: StepsServed(STUDENT.steps, True, "prompts")}

    def teacher(self) -> str:
        return str(self._teacher)

    def dataset(self, training: Training) -> Any:
        return PromptDataset(["a", "b", "c"])

    def trainings(self, student: Student) -> list[Training]:
        common = {"train_batch_size": 2, "max_train_steps": 8, "lr_scheduler": "cosine"}
        common |= {"ema_decay": 0.9, "learning_rate": 1e-3, "checkpointing_steps": 0}
        common |= {"tuning": {"student": "full", "fake": "full"}, "method": "dmd2"}
        few = {**common, "method_config": {"num_steps": 2, "guidance": 1.0, "critic_steps": 1}}
        one = {**common, "method_config": {"num_steps": 1, "guidance": 1.0, "critic_steps": 1}}
        return [
            Training("first", one, "prompts", 0.25),
            Training("last", few, "prompts", 0.75, "student"),
        ]

    def judge(self, label: str, steps: int, folder: Path) -> dict[str, Any]:
        weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
        value = sum(float(w.double().square().sum()) for w in weights.values())
        spread = {"mean": value, "std": 0.0}
        return {"label": label, "steps": steps, "frechet": spread, "recall": None, "group": "x"}


def run(out: Path, teacher: Path, budget: Budget = Budget(updates=8), points: int = 3) -> dict:  # noqa: B008
    run_student(Tiny(out, teacher), STUDENT, 0, budget, points)
    return json.loads(result_file(out, STUDENT, 0).read_text())


def values(result: dict) -> list[Any]:
    points = [(p["share"], p["updates"], p["rows"]) for p in result["curve"]]
    return [result["updates"], points, result["rows"]]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return teacher_dir("sd3", tmp_path_factory)


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory) -> dict:
    return run(tmp_path_factory.mktemp("whole"), teacher)


def test_points_are_halves_and_lie_in_the_training_they_fall_in() -> None:
    assert shares(4) == [0.125, 0.25, 0.5, 1.0]
    assert stops(shares(4), 0.0, 0.2, 100, last=False) == {62: 0.125}
    assert stops(shares(4), 0.2, 0.8, 400, last=True) == {25: 0.25, 150: 0.5, 400: 1.0}
    assert stops(shares(2), 0.0, 0.5, 10, last=False) == {10: 0.5}
    assert stops(shares(1), 0.0, 1.0, 7, last=True) == {7: 1.0}


@pytest.mark.full
def test_curve_is_judged_at_its_shares_of_both_trainings(whole) -> None:
    assert whole["updates"] == [2, 6]
    assert whole["clock"] == f"{cost.CLOCK}, 1 thread"
    assert [(p["share"], p["updates"]) for p in whole["curve"]] == [(0.25, 2), (0.5, 4)]
    seconds = [p["seconds"] for p in whole["curve"]] + [whole["cpu_seconds"]]
    assert 0 < seconds[0] < seconds[1] < seconds[2]
    # The first training's student is one of a single step: no other is reached.
    assert [[row["steps"] for row in p["rows"]] for p in whole["curve"]] == [[1], [1, 2]]
    assert [row["steps"] for row in whole["rows"]] == [1, 2]


@pytest.mark.full
def test_looking_on_the_way_does_not_change_the_student(whole, teacher, tmp_path) -> None:
    plain = run(tmp_path, teacher, points=1)
    assert plain["curve"] == []
    assert plain["rows"] == whole["rows"]


@pytest.mark.full
@pytest.mark.parametrize("update", [pytest.param(n, marks=SLOW) for n in (3, 14)] + [9])
def test_a_killed_run_goes_on_and_ends_the_same(update, whole, teacher, tmp_path) -> None:
    """Two updates (student, fake) a step: in the first training, before and after a point."""

    def killed() -> None:
        left, going = [update], DistillationTrainer._update

        def counted(self: Any, *args: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            going(self, *args)

        DistillationTrainer._update = counted  # type: ignore[method-assign]
        run(tmp_path, teacher)

    assert status_of(fork(killed)) == -signal.SIGKILL
    assert not result_file(tmp_path, STUDENT, 0).exists()
    counted: list[int] = []
    going = DistillationTrainer._update

    def count(self: Any, *args: Any) -> None:
        counted.append(self.step)
        going(self, *args)

    DistillationTrainer._update = count  # type: ignore[method-assign]
    try:
        again = run(tmp_path, teacher)
    finally:
        DistillationTrainer._update = going  # type: ignore[method-assign]
    assert values(again) == values(whole)
    assert len(counted) == 16 - update + update % 2  # whole steps are kept, each is saved here


@pytest.mark.full
def test_a_signal_saves_and_the_next_call_goes_on(whole, teacher, tmp_path) -> None:
    def signalled() -> None:
        going = DistillationTrainer._update

        def told(self: Any, *args: Any) -> None:
            if self.args.max_train_steps == 6 and self.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            going(self, *args)

        DistillationTrainer._update = told  # type: ignore[method-assign]
        run(tmp_path, teacher)

    assert status_of(fork(signalled)) == 75
    assert not result_file(tmp_path, STUDENT, 0).exists()
    assert values(run(tmp_path, teacher)) == values(whole)


@pytest.mark.full
def test_an_update_s_cost_is_measured_once(teacher, tmp_path, monkeypatch) -> None:
    costs = iter([Cost(0.5, 0.5, 1.0), Cost(0.25, 0.25, 1.0)])
    monkeypatch.setattr(student_run, "measure", lambda *_: next(costs))
    monkeypatch.setattr(Tiny, "judge", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        run(tmp_path, teacher, Budget(seconds=1.0), points=2)
    monkeypatch.undo()
    monkeypatch.setattr(student_run, "measure", lambda *_: 1 / 0)
    made = run(tmp_path, teacher, Budget(seconds=1.0), points=2)
    assert made["updates"] == [1, 3]  # 0.25 s and 0.75 s at those costs


def test_progress_of_other_trainings_is_dropped(tmp_path) -> None:
    one, other = Training("a", {"x": 1}, "prompts"), Training("a", {"x": 2}, "prompts")
    made = Progress.of(tmp_path / "work", [one])
    made.legs.append(Leg(99, step=3, seconds=1.5))
    made.save()
    assert Progress.of(tmp_path / "work", [one]).legs == made.legs
    (tmp_path / "work" / "last").mkdir()
    assert Progress.of(tmp_path / "work", [other]).legs == []
    assert not (tmp_path / "work" / "last").exists()


def test_a_run_that_ends_early_is_no_result(teacher, tmp_path, monkeypatch) -> None:
    going = Tiny.trainings

    def short(self: Any, student: Student) -> list[Training]:
        made = going(self, student)
        settings = {**made[0].settings, "max_train_seconds": 1e-6}
        return [replace(made[0], settings=settings), *made[1:]]

    monkeypatch.setattr(Tiny, "trainings", short)
    with pytest.raises(RuntimeError, match="train: expected 2 updates, got 1"):
        run(tmp_path, teacher)


@pytest.mark.full
def test_the_best_seed_s_pipelines_stay(whole, teacher, tmp_path) -> None:
    made = run(tmp_path, teacher, points=1)
    assert made["terms"] == {"guidance": "1", "batch size": "2", "student": "full"}
    for steps in STUDENT.steps:
        assert (best_student_folder(tmp_path, "tiny", steps) / "model_index.json").is_file()


def test_what_a_run_failed_of_is_its_last_line(tmp_path, capsys) -> None:
    plan = {"budget": "5steps", "ground": {"kind": "digits", "options": {"nonsense": 1}}}
    (tmp_path / "comparison.json").write_text(json.dumps(plan))
    student = json.dumps({"recipe": "dmd2", "steps": [1]})
    with pytest.raises(SystemExit) as ended:
        student_run.main([str(tmp_path), student, "0"], setups())
    assert str(ended.value).startswith("TypeError: ")
    assert "nonsense" in str(ended.value)
    assert "\n" not in str(ended.value)
    assert "Traceback" in capsys.readouterr().err
