"""The digits' teacher under guidance 3, with a fake that never learns and with one that does; and
vsd without a warm start, which draws one image a class."""

from __future__ import annotations

import json

import pytest

from stepdistill import (
    DistributionMatchingTrainer,
    TrainConfig,
    Tuning,
    VariationalScoreTrainer,
)
from stepdistill.demo.data import DIGIT_NAMES, load_digit_splits, prompt_for
from stepdistill.demo.teacher import TeacherConfig, load_or_train_teacher
from stepdistill.monitoring.watchdog import WatchdogStop

# Minutes each: test_signs_small.py, test_fake_lag.py and test_watchdog.py tell it of small ones.
pytestmark = pytest.mark.every


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "teacher"
    return load_or_train_teacher(
        TeacherConfig(max_train_steps=900), load_digit_splits().train, folder, False
    ).folder


def trainer_of(teacher, folder, fake_rate: float) -> DistributionMatchingTrainer:
    args = TrainConfig(
        output_dir=str(folder),
        max_train_steps=200,
        train_batch_size=32,
        learning_rate=1e-4,
        role_learning_rates={"fake": fake_rate},
        tuning=Tuning(student="full", fake="full"),
        validation_prompts=[DIGIT_NAMES[i] for i in (0, 3, 5, 8)],
        num_validation_images=8,
        validation_steps=25,
        checkpointing_steps=25,
        disable_progress_bar=True,
        watchdog={"drift": "stop"},
    )
    options = {"num_steps": 1, "guidance": 3.0, "critic_steps": 2}
    prompts = list(DIGIT_NAMES)
    return DistributionMatchingTrainer(str(teacher), args, prompts, "dmd2", options)


def rows(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_fake_that_never_learns_is_told_by_its_lag_and_stopped_as_drift(
    teacher, tmp_path
) -> None:
    """The lag turns the push around long before samples are past saving."""
    trainer = trainer_of(teacher, tmp_path, 1e-12)
    with pytest.raises(WatchdogStop, match=r"student: x0 drifts.* excess saturation .*checkpoint-"):
        trainer.train()
    alarms = {e["check"]: e for e in rows(tmp_path, "events.jsonl") if e["kind"] == "alarm"}
    lag = {row["step"]: row["fake_lag"] for row in rows(tmp_path, "validation.jsonl")}
    print(alarms, lag)
    assert alarms["fake_lag"]["step"] == pytest.approx(75, abs=25)
    assert alarms["drift"]["step"] == pytest.approx(150, abs=25)
    assert abs(lag[0]) < 0.2
    assert lag[alarms["fake_lag"]["step"]] < -0.8
    assert lag[alarms["drift"]["step"]] < -2.0


def test_a_student_that_draws_one_image_a_class_is_told_unasked(teacher, tmp_path) -> None:
    """vsd by its own options at rates that move a small model; nothing is said of what watches."""
    args = TrainConfig(
        output_dir=str(tmp_path),
        max_train_steps=150,
        train_batch_size=32,
        learning_rate=1e-3,
        adam_beta2=0.99,
        adam_weight_decay=0.0,
        max_grad_norm=100.0,
        tuning=Tuning(student="full", fake="full"),
        disable_progress_bar=True,
    )
    prompts = [prompt_for(label) for label in range(len(DIGIT_NAMES))]
    VariationalScoreTrainer(str(teacher), args, prompts, "vsd").train()
    alarms = [e for e in rows(tmp_path, "events.jsonl") if e["kind"] == "alarm"]
    print(alarms)
    assert "spread" in {e["check"] for e in alarms}


def test_one_that_learns_is_left_in_peace(teacher, tmp_path) -> None:
    trainer = trainer_of(teacher, tmp_path, 5e-4)
    trainer.train()
    assert trainer.step == 200
    assert [event["kind"] for event in rows(tmp_path, "events.jsonl")] == ["end"]
    print({row["step"]: row["fake_lag"] for row in rows(tmp_path, "validation.jsonl")})
    assert max(abs(row["fake_lag"]) for row in rows(tmp_path, "validation.jsonl")) < 0.5
