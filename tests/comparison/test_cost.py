"""An update's cost: samples read for the first time apart, saving left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comparison.test_student_run import STUDENT, Tiny
from support.runs import teacher_dir

from stepdistill.comparison import cost
from stepdistill.comparison.cost import Cost, measure, train
from stepdistill.data.stream import PromptDataset
from stepdistill.families.registry import family_for
from stepdistill.trainers import DistillationTrainer


class Many(Tiny):
    """With more prompts than a measurement reads."""

    size = 400

    def dataset(self, training: Any) -> Any:
        return PromptDataset([f"prompt {n}" for n in range(self.size)])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock on which an optimiser update takes 1, encoding a prompt 10, a save 1000."""
    now = [0.0]

    def taking(seconds: Any, going: Any) -> Any:
        def told(*args: Any, **options: Any) -> Any:
            now[0] += seconds(*args)
            return going(*args, **options)

        return told

    saves = taking(lambda *_: 1000.0, DistillationTrainer.save)
    monkeypatch.setattr(DistillationTrainer, "save", saves)
    updates = taking(lambda *_: 1.0, DistillationTrainer._update)
    monkeypatch.setattr(DistillationTrainer, "_update", updates)
    family = family_for("StableDiffusion3Pipeline")
    encodes = taking(lambda _, rows, *__: 10.0 * len(rows), family.encode)
    monkeypatch.setattr(family, "encode", encodes)
    monkeypatch.setattr(cost, "clock", lambda: now[0])
    return now


def test_updates_that_fill_a_time_count_the_first_epoch_by_its_own_cost() -> None:
    dear = Cost(first=3.0, later=1.0, epoch=10.0)
    assert dear.updates_in(15.0) == 5
    assert dear.updates_in(30.0) == 10
    assert dear.updates_in(50.0) == 30
    assert dear.updates_in(0.1) == 1
    assert Cost(3.0, 1.0, math.inf).updates_in(300.0) == 100


@pytest.mark.full
def test_first_reading_is_measured_apart_and_saving_not_at_all(
    counted: list[float], tmp_path: Path, tmp_path_factory: Any
) -> None:
    setup = Many(tmp_path, teacher_dir("sd3", tmp_path_factory))
    training = setup.trainings(STUDENT)[0]
    found = measure(setup, training, tmp_path / "probe")
    # A step is an update of the student and one of the fake score, each of two prompts.
    assert found.later == 2.0
    assert found.first == 2.0 + 10.0 * 4
    assert found.epoch == Many.size / 4
    assert not (tmp_path / "probe").exists()
    trainer = setup.trainer(training, 150, tmp_path / "run", seed=0, saves=8)
    assert train(trainer) == pytest.approx(100 * found.first + 50 * found.later, rel=0.01)
    assert found.updates_in(100 * found.first + 50 * found.later) == 150


@pytest.mark.full
def test_a_set_that_no_memory_keeps_is_read_anew_for_ever(
    counted: list[float], tmp_path: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Many, "size", 5000)
    setup = Many(tmp_path, teacher_dir("sd3", tmp_path_factory))
    assert measure(setup, setup.trainings(STUDENT)[0], tmp_path / "probe").epoch == math.inf


@pytest.mark.full
@pytest.mark.parametrize(("seconds", "spent"), [(5000.0, 500.0), (10.0, 2 * 42.0 + 2 * 42.0)])
def test_measuring_takes_a_tenth_of_the_budget_or_two_updates_of_each_kind(
    counted: list[float], tmp_path: Path, tmp_path_factory: Any, seconds: float, spent: float
) -> None:
    setup = Many(tmp_path, teacher_dir("sd3", tmp_path_factory))
    measure(setup, setup.trainings(STUDENT)[0], tmp_path / "probe", seconds)
    assert 0 < counted[0] <= spent
    assert counted[0] < 1000.0  # nothing is saved


def in_little(cost_at: Callable[[int], float], kind_at: Callable[[int], str]) -> Any:
    """A setup whose trainer's updates take `cost_at` their number and read two batches."""
    trainer = SimpleNamespace(step=0, feed=SimpleNamespace(seen=0), dataset=range(10))
    trainer.args = SimpleNamespace(
        train_batch_size=1, max_cached_latents=100, max_cached_prompts=100
    )
    trainer.batches = SimpleNamespace(latents_kept=100)
    trainer.method = SimpleNamespace(phases=lambda step: (kind_at(step),))

    def train(trainer: Any, until: int, saves: bool = True) -> float:
        spent = sum(cost_at(step) for step in range(trainer.step, until))
        trainer.feed.seen += 2 * (until - trainer.step)
        trainer.step = until
        return spent

    return SimpleNamespace(trainer=lambda *_, **__: trainer), train


def test_a_warm_start_counts_by_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup, train = in_little(
        lambda step: 8.0 if step < 125 else 1.0, lambda step: "warm" if step < 125 else "matching"
    )
    monkeypatch.setattr(cost, "train", train)
    (tmp_path / "probe").mkdir()
    monkeypatch.setattr(cost.shutil, "rmtree", lambda *_, **__: None)
    assert measure(setup, STUDENT, tmp_path / "probe") == Cost(1.875, 1.875, 5.0)
