"""Validation that nobody asked for: when, on what, at what cost, and that it ends no run."""

from __future__ import annotations

import json

import pytest
from support.runs import build_trainer, teacher_dir

from stepdistill.config.files import method_class, method_config
from stepdistill.config.run import TrainConfig
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath
from stepdistill.monitoring.own_validation import Grid, OwnValidation, schedule
from stepdistill.monitoring.validation_line import line_of

DMD2 = {"num_steps": 4, "guidance": 8.0, "critic_steps": 5}
STEP = 35.0  # rows of a DMD2 update at batch 1: student, guided teacher, fake and its five updates


def method_of(name: str, **options):
    config = method_config(name, options)
    return method_class(name)(config, Setting(FlowPath(), "flow"))


@pytest.mark.parametrize(("batch", "calls"), [(1, 2), (2, 1), (16, 1)])
def test_rows_are_those_of_each_call_of_a_whole_batch(batch, calls) -> None:
    """Two images of one step, guided at 8: the teacher's 4 steps and 1 probe with and its 4 without
    guidance; the student's step, a probe, and a step and three noise levels of the lag (2 + 1)."""
    method = method_of("dmd2", num_steps=1, guidance=8.0)
    grid = Grid(2, 1, teacher_steps=4)
    reference, each = grid.rows(method, TrainConfig(train_batch_size=batch))
    assert reference == ((4 + 1) * 2 + 4) * calls * batch + 2 * 2 * 4
    assert each == (1 + 1 + 1 + 3 * 3) * calls * batch + 2 * 4


def test_the_lag_of_several_steps_is_of_samples_that_stop_at_each() -> None:
    method, args = method_of("dmd2", **DMD2), TrainConfig()
    one, eight = (Grid(1, n, 0).rows(method, args)[1] for n in (1, 8))
    lag = sum(stop + 3 * 3 for stop in (1, 2, 3, 4))
    assert one == 4 + lag + 4
    assert eight == 4 * 8 + lag * 2 + 4 * 8


@pytest.mark.parametrize("steps", [2_000, 10_000, 100_000])
def test_a_schedule_keeps_within_its_share(steps) -> None:
    method, args = method_of("dmd2", **DMD2), TrainConfig(max_train_steps=steps)
    found = schedule(method, args, STEP, 4, steps)
    reference, each = found.grid.rows(method, args)
    count = -(-steps // found.every)
    assert 4 <= count <= 20
    assert reference + count * each == pytest.approx(found.share * STEP * steps)
    assert found.share < 0.02


def test_a_shorter_run_has_a_smaller_grid_then_none() -> None:
    method = method_of("dmd2", **DMD2)
    grids = [schedule(method, TrainConfig(), STEP, 4, n) for n in (20_000, 4_000, 2_000, 100)]
    assert [(s.grid.prompts, s.grid.images) for s in grids[:3]] == [(4, 4), (4, 2), (2, 2)]
    assert grids[3].every == 0


def test_a_method_without_a_teacher_has_no_reference() -> None:
    found = schedule(method_of("reflow", stage="distill"), TrainConfig(), 12.0, 4, 10_000)
    assert found.grid.teacher_steps == 0


def own(**options) -> OwnValidation:
    args = TrainConfig(max_train_steps=20_000, **options)
    return OwnValidation(args, method_of("dmd2", **DMD2))


def test_prompts_are_the_first_of_the_data() -> None:
    made = own()
    for step, prompts in enumerate((["a", "b"], ["b", "c"], ["d", "e"])):
        assert not made.due(step)
        made.see({"prompt": prompts}, 35)
    assert made.due(3)
    said = made.decide(3, 1.0)
    assert said["prompts"] == made.args.validation_prompts == ["a", "b", "c", "d"]
    assert made.args.validation_steps == said["steps"] > 0
    assert "4 prompts" in line_of(said)
    assert not made.open


def test_those_that_are_told_win_and_steps_0_is_none() -> None:
    made = own(validation_prompts=["x"], num_validation_images=3)
    made.see({"prompt": ["a"]}, 35)
    assert made.due(1)
    made.decide(1, 1.0)
    assert (made.args.validation_prompts, made.args.num_validation_images) == (["x"], 3)
    off = own(validation_steps=0)
    off.see({"prompt": ["a"]}, 35)
    assert not off.open
    assert not off.due(16)
    assert off.args.validation_steps == 0


def test_one_prompt_alone_is_waited_for_sixteen_updates() -> None:
    made = own()
    for _ in range(16):
        made.see({"prompt": ["a"]}, 35)
    assert not made.due(15)
    assert made.due(16)
    assert made.decide(16, 1.0)["prompts"] == ["a"]


def test_a_budget_of_seconds_counts() -> None:
    made = own(max_train_seconds=10.0)
    for _ in range(4):
        made.see({"prompt": ["a", "b", "c", "d"]}, 35)
    said = made.decide(4, 4.0)
    assert said["steps"] == 0
    assert "10 updates are too few for some within 2%" in line_of(said)


def test_what_was_decided_survives_a_checkpoint_and_older_runs_have_none() -> None:
    made, again, older = own(), own(), own()
    made.see({"prompt": ["a", "b", "c", "d"]}, 35)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.due(1)
    assert made.decide(1, 1.0) == again.decide(1, 1.0)
    third = own()
    third.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert third.args == made.args
    assert not third.due(16)
    older.load_state_dict(None)
    assert older.args.validation_steps == 0
    assert not older.due(16)


@pytest.fixture
def teacher(tmp_path_factory):
    return teacher_dir("sd3", tmp_path_factory)


@pytest.fixture
def cheap(monkeypatch):
    """Twelve updates pay for validations."""
    monkeypatch.setattr("stepdistill.monitoring.own_validation._COUNTED_SHARE", 20.0)
    monkeypatch.setattr("stepdistill.monitoring.own_validation._MOST", 4)
    monkeypatch.setattr("stepdistill.monitoring.own_validation._STEPS_SEEN", 2)


OPTIONS = {"max_train_steps": 12, "validation_teacher_steps": 2, "num_validation_images": 2}


def steps_of(folder) -> list[int]:
    lines = (folder / "validation.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.full
@pytest.mark.usefixtures("cheap")
def test_a_run_validates_by_itself_and_a_resumed_one_at_the_same_steps(teacher, tmp_path) -> None:
    one = build_trainer("dmd2", teacher, "lora", tmp_path / "one", **OPTIONS)
    one.train()
    every = one.facts["validation"]["steps"]
    assert steps_of(tmp_path / "one") == list(range(every, 13, every))
    said = json.loads((tmp_path / "one" / "run.json").read_text())["validation"]
    assert said["prompts"] == one.own_validation.args.validation_prompts
    two = build_trainer("dmd2", teacher, "lora", tmp_path / "two", **OPTIONS)
    two.train(until=7)
    resumed = build_trainer(
        "dmd2", teacher, "lora", tmp_path / "two", resume_from_checkpoint="latest", **OPTIONS
    )
    resumed.train()
    planned = [step for step in steps_of(tmp_path / "two") if step % every == 0]
    assert planned == steps_of(tmp_path / "one")
    assert resumed.facts["validation"] == one.facts["validation"]
    mine, theirs = (t.log.watchdog.state_dict() for t in (one, resumed))
    assert mine == theirs


@pytest.mark.full
@pytest.mark.usefixtures("cheap")
def test_one_that_fails_ends_no_run(teacher, tmp_path, monkeypatch, capsys) -> None:
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path, **OPTIONS)

    def fails(*_args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(trainer.validator, "run", fails)
    trainer.train()
    assert trainer.step == 12
    assert "CUDA out of memory" in trainer.facts["validation"]["why"]


def test_a_short_run_has_none_and_says_so(teacher, tmp_path) -> None:
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path, max_train_steps=2)
    trainer.train()
    assert "too few" in json.loads((tmp_path / "run.json").read_text())["validation"]["why"]
    assert not (tmp_path / "validation.jsonl").exists()
