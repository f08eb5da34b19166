"""However a run ends, its records and its report say so, and it goes on from there."""

from __future__ import annotations

import json

import pytest
from support.runs import build_trainer, fingerprint, teacher_dir

from stepdistill.monitoring import logs
from stepdistill.monitoring.watchdog import WatchdogStop


@pytest.fixture
def run(tmp_path, tmp_path_factory):
    """Makes trainers of four updates, each saved."""

    def build(folder=tmp_path, **options):
        return build_trainer(
            "dmd2", teacher_dir("sd3", tmp_path_factory), "lora", folder,
            **{"max_train_steps": 4, "checkpointing_steps": 1, **options},
        )  # fmt: skip

    return build


def breaking(trainer, step: int, err: BaseException):
    """The trainer, with `err` in the first update of that step."""
    update = trainer._update

    def broken(*args) -> None:
        if trainer.step == step:
            raise err
        update(*args)

    trainer._update = broken
    return trainer


def ends(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "end"]


CASES = [
    (KeyboardInterrupt(), "interrupted", "Go on with --resume_from_checkpoint latest."),
    (RuntimeError("no\n  memory"), "failed", "RuntimeError: no memory"),
    (SystemExit(), "failed", "SystemExit"),
]


@pytest.mark.sampled("err1-failed-RuntimeError: no memory")
@pytest.mark.parametrize(("err", "state", "why"), CASES)
def test_whatever_ends_a_run_is_told(run, tmp_path, err, state, why) -> None:
    with pytest.raises(type(err)) as raised:
        breaking(run(), 2, err).train()
    assert raised.value is err
    assert ends(tmp_path) == [{"step": 2, "kind": "end", "state": state, "why": why}]
    report = (tmp_path / "report.html").read_text()
    assert f'<span class="badge {state}">{state}</span>' in report
    assert why in report


def test_an_error_of_the_first_validation_too(run, tmp_path, monkeypatch) -> None:
    trainer = run(validation_steps=1, validation_prompts=["a"])
    monkeypatch.setattr(trainer.validator, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert [end["state"] for end in ends(tmp_path)] == ["failed"]


@pytest.mark.full
def test_an_interrupted_run_goes_on_to_the_same_end(run, tmp_path) -> None:
    with pytest.raises(KeyboardInterrupt):
        breaking(run(), 2, KeyboardInterrupt()).train()
    again = run(resume_from_checkpoint="latest")
    again.train()
    assert [(end["step"], end["state"]) for end in ends(tmp_path)] == [(4, "finished")]
    whole = run(tmp_path / "whole")
    whole.train()
    for role in ("student", "fake"):
        assert fingerprint(again.bank.members(role)) == fingerprint(whole.bank.members(role))


def test_a_full_disk_hides_no_error(run, tmp_path, monkeypatch) -> None:
    def full(*_args) -> None:
        raise OSError("No space left on device")

    trainer = breaking(run(), 2, RuntimeError("the cause"))
    monkeypatch.setattr(trainer.log, "_append", full)
    monkeypatch.setattr(logs, "write_run_report", full)
    trainer.log.write = lambda *_: None
    with pytest.raises(RuntimeError, match="the cause"):
        trainer.train()


def test_nor_one_of_the_watchdog(run, monkeypatch) -> None:
    def full(*_args) -> None:
        raise OSError("No space left on device")

    trainer = run(learning_rate=1e18, max_grad_norm=1e30, max_train_steps=30)
    monkeypatch.setattr(logs, "write_run_report", full)
    trainer.log._reported = float("inf")
    with pytest.raises(WatchdogStop, match="expected a finite"):
        trainer.train()


def test_a_run_ends_once(run, tmp_path, monkeypatch) -> None:
    """What fails after the end is told by its error alone."""
    trainer = run(max_train_steps=1)
    monkeypatch.setattr(trainer.accelerator, "end_training", lambda: 1 / 0)
    trainer.args.report_to = ["tensorboard"]
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert [end["state"] for end in ends(tmp_path)] == ["finished"]


@pytest.mark.full
def test_a_run_that_has_not_begun_leaves_the_records_alone(run, tmp_path, monkeypatch) -> None:
    run(max_train_steps=1).train()
    before = (tmp_path / "events.jsonl").read_bytes()
    again = run(resume_from_checkpoint="latest")
    monkeypatch.setattr("stepdistill.training.feed.prepare_cache", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        again.train()
    assert (tmp_path / "events.jsonl").read_bytes() == before


def test_a_failing_process_waits_for_no_other(run, tmp_path, monkeypatch) -> None:
    """They may be in another collective, or gone."""
    trainer = breaking(run(report_to=["tensorboard"]), 1, RuntimeError("alone"))
    told = trainer.log.broken_off
    asked: list[str] = []

    def broken_off(*args) -> None:
        for name in ("reduce", "gather", "wait_for_everyone", "end_training"):
            monkeypatch.setattr(trainer.accelerator, name, lambda *_, name=name: asked.append(name))
        told(*args)

    trainer.log.broken_off = broken_off
    with pytest.raises(RuntimeError, match="alone"):
        trainer.train()
    assert asked == []
    assert [end["state"] for end in ends(tmp_path)] == ["failed"]


@pytest.mark.full
def test_a_line_cut_short_and_written_on_does_not_stop_a_resumed_run(run, tmp_path) -> None:
    with pytest.raises(RuntimeError):
        breaking(run(), 2, RuntimeError("full")).train()
    events = tmp_path / "events.jsonl"
    events.write_text('{"kind": "alarm", "st' + events.read_text())
    run(resume_from_checkpoint="latest").train()
    assert [end["state"] for end in ends(tmp_path)] == ["finished"]
