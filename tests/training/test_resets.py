"""A method that clears optimiser state: what goes, what stays, and exact resume across it."""

from __future__ import annotations

import shutil

import pytest
from support.runs import TinyData, build_trainer, fingerprint, teacher_dir

from stepdistill import TrainConfig, Tuning
from stepdistill.families.registry import load_family
from stepdistill.trainers import TrajectorySegmentedTrainer
from stepdistill.training.optim import reset_roles

OPTIONS = {
    "segments": (2, 1),
    "stage_starts": (2,),
    "target": "ema",
    "gan": {"weight_g": 0.1},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return teacher_dir("sd3", tmp_path_factory)


@pytest.fixture(scope="module")
def first(teacher, tmp_path_factory):
    """Four steps, the second stage from step 2 on, with a checkpoint of each."""
    trainer = trainer_of(teacher, tmp_path_factory.mktemp("first") / "run")
    trainer.train()
    return trainer


def trainer_of(teacher, output_dir, max_train_steps=4, **options):
    args = TrainConfig(
        output_dir=str(output_dir),
        max_train_steps=max_train_steps,
        train_batch_size=2,
        learning_rate=1e-3,
        checkpointing_steps=1,
        disable_progress_bar=True,
        ema_decay=0.9,
        tuning=Tuning(student="lora", rank=2),
        **options,
    )
    data = TinyData(load_family(teacher).sample_shape(), "prompt", ("x0",))
    return TrajectorySegmentedTrainer(str(teacher), args, data, "tscd", OPTIONS)


def adam_steps(trainer, role) -> set[int]:
    state = trainer.optimizer.state
    return {int(state[p]["step"]) for p in trainer.bank.members(role).values()}


@pytest.mark.full
def test_adam_starts_anew_at_the_stage_switch(first) -> None:
    """Two Adam steps since, not four."""
    assert adam_steps(first, "student") == {2}
    assert adam_steps(first, "disc") == {2}


@pytest.mark.full
@pytest.mark.parametrize("checkpoint", [1, 2, 3])
def test_resume_before_at_and_after_the_switch_is_exact(
    first, teacher, tmp_path, checkpoint
) -> None:
    shutil.copytree(first.args.output_dir, tmp_path / "run")
    where = str(tmp_path / "run" / f"checkpoint-{checkpoint}")
    again = trainer_of(teacher, tmp_path / "run", resume_from_checkpoint=where)
    again.train()
    for role in first.bank.roles:
        assert fingerprint(first.bank.members(role)) == fingerprint(again.bank.members(role)), role
    assert adam_steps(again, "student") == adam_steps(first, "student")


@pytest.mark.full
def test_averages_restart_from_the_role_they_follow(teacher, tmp_path) -> None:
    trainer = trainer_of(teacher, tmp_path / "run", max_train_steps=3)
    trainer.train()
    student = fingerprint(trainer.bank.members("student"))
    for role in ("target", "ema"):
        assert fingerprint(trainer.bank.members(role)) != student
    reset_roles(trainer.bank, trainer.optimizer, ("student",))
    for role in ("target", "ema"):
        assert fingerprint(trainer.bank.members(role)) == student
    state = trainer.optimizer.state
    assert not any(p in state for p in trainer.bank.members("student").values())
    assert adam_steps(trainer, "disc") == {1}, "another role's state stays"


def test_methods_reset_nothing_by_default(teacher, tmp_path) -> None:
    trainer = build_trainer("lcm", teacher, "lora", tmp_path, max_train_steps=3)
    assert trainer.method.resets(1, 3) == ()
    trainer.train()
    assert adam_steps(trainer, "student") == {3}
