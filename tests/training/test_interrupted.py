"""What comes between steps, beside a run or into its folder ends none without what it was at."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from support.runs import build_trainer, fingerprint, teacher_dir

from stepdistill.core.stopping import Stopped
from stepdistill.data.stream import PromptDataset
from stepdistill.storage import owner
from stepdistill.storage.checkpoints import list_checkpoints
from stepdistill.storage.owner import lock_of


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return teacher_dir("sd3", tmp_path_factory)


@pytest.fixture
def run(tmp_path, teacher):
    """Makes trainers of four updates from prompts."""

    def build(folder: Path = tmp_path / "run", **options: Any) -> Any:
        fixed = {"max_train_steps": 4, "dataset": PromptDataset([f"thing {i}" for i in range(6)])}
        return build_trainer("dmd2", teacher, "lora", folder, **{**fixed, **options})

    return build


@pytest.fixture(scope="module")
def weights(tmp_path_factory, teacher) -> dict[str, str]:
    """Of the run that nobody touched."""
    trainer = build_trainer(
        "dmd2", teacher, "lora", tmp_path_factory.mktemp("whole"), max_train_steps=4,
        dataset=PromptDataset([f"thing {i}" for i in range(6)]),
    )  # fmt: skip
    trainer.train()
    return fingerprint(trainer.bank.members("student"))


def student(trainer: Any) -> dict[str, str]:
    return fingerprint(trainer.bank.members("student"))


def at_step(trainer: Any, step: int, work: Any) -> Any:
    """The trainer, with `work` before the first update of that step."""
    update, done = trainer._update, []

    def watched(*args: Any) -> None:
        if trainer.step == step and not done:
            done.append(work())
        update(*args)

    trainer._update = watched
    return trainer


def names(trainer: Any) -> list[str]:
    return [p.name for p in list_checkpoints(trainer.output_dir)]


def state(trainer: Any, step: int) -> dict[str, Any]:
    file = trainer.output_dir / f"checkpoint-{step}" / "trainer_state.json"
    return json.loads(file.read_text())


def signalled(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


# --------------------------------------------------------------------- two runs
@pytest.mark.usefixtures("no_loading")
def test_a_second_run_in_a_folder_is_refused_before_it_loads(run, tmp_path) -> None:
    lock = lock_of(tmp_path / "run")
    lock.parent.mkdir()
    other = os.getppid()
    lock.write_text(json.dumps({**owner._me(), "pid": other, "started": owner.started(other)}))
    with pytest.raises(ValueError, match=f"output_dir: .* which process {other} on"):
        run(resume_from_checkpoint="latest")
    assert [p.name for p in lock.parent.iterdir()] == [lock.name]


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("name", ["log.jsonl", "report.html", "best.json"])
def test_a_users_file_is_not_written_on(run, tmp_path, name) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(ValueError, match=f"output_dir: expected a folder without {name}"):
        run(resume_from_checkpoint="latest")


def test_the_folder_is_given_back_however_a_run_ends(run) -> None:
    def fails() -> None:
        assert lock_of(trainer.output_dir).is_file()
        raise RuntimeError

    trainer = at_step(run(), 1, fails)
    with pytest.raises(RuntimeError):
        trainer.train()
    assert not lock_of(trainer.output_dir).exists()


# ---------------------------------------------------------------------- records
@pytest.mark.full
def test_damaged_records_beside_whole_checkpoints_cost_no_run(run, weights, capsys) -> None:
    run().train(until=2)
    folder = run(resume_from_checkpoint="latest").output_dir
    log = folder / "log.jsonl"
    log.write_bytes(b"\0\0\xff\n{}\n[1]\n" + log.read_bytes() + b'{"step": 2, "se')
    (folder / "events.jsonl").write_text('{"step": null}\nnoise')
    (folder / "validation.jsonl").mkdir()
    (folder / "run.json").write_text('{"model": ')
    (folder / "best.json").write_text("\0")
    (folder / "report.html").unlink()
    (folder / "report.html").mkdir()
    (folder / "report.html" / "mine.txt").write_text("mine")
    trainer = run(resume_from_checkpoint="latest")
    trainer.train()
    assert student(trainer) == weights
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3, 4]
    assert json.loads((folder / "run.json").read_text())["method"] == "dmd2"
    told = capsys.readouterr().out
    aside = (
        "log.jsonl",
        "events.jsonl",
        "validation.jsonl",
        "run.json",
        "best.json",
        "report.html",
    )
    for name in aside:
        assert f"{name}.aside" in told
        assert (folder / f"{name}.aside").exists()
    assert (folder / "report.html.aside" / "mine.txt").read_text() == "mine"


@pytest.mark.usefixtures("no_loading")
def test_another_run_is_told_by_its_checkpoint_where_the_record_is_damaged(
    run, tmp_path, request
) -> None:
    request.getfixturevalue("monkeypatch").undo()
    run().train(until=1)
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ValueError, match="seed 0 \\(saved\\) against 3"):
        run(resume_from_checkpoint="latest", seed=3)


@pytest.mark.full
def test_a_bad_line_or_report_in_a_going_run_ends_it_not(run, weights, capsys) -> None:
    def damage() -> None:
        with (trainer.output_dir / "events.jsonl").open("a") as file:
            file.write("noise\nnoise\n")
        (trainer.output_dir / "log.jsonl").unlink()
        (trainer.output_dir / "log.jsonl").mkdir()

    trainer = at_step(run(), 1, damage)
    trainer.train()
    assert student(trainer) == weights
    assert names(trainer) == ["checkpoint-4"]
    told = capsys.readouterr().out
    assert told.count("log.jsonl: not written, the run goes on.") == 1
    assert told.count("report.html: not written, the run goes on.") == 1


# ---------------------------------------------------------------------- signals
@pytest.mark.sampled("15")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("ctrl_c")
def test_a_signal_in_a_step_saves_it(run, weights, number) -> None:
    trainer = at_step(run(), 1, lambda: signalled(number))
    trainer.train()
    assert (trainer.step, trainer.stop.preempted, names(trainer)) == (2, True, ["checkpoint-2"])
    again = run(resume_from_checkpoint="latest")
    again.train()
    assert student(again) == weights


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_is_not_waited_for(run) -> None:
    trainer = at_step(run(), 1, lambda: [signalled(signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert names(trainer) == []


VALIDATED = {
    "validation_steps": 2, "validation_prompts": ["a"], "num_validation_images": 2,
    "validation_teacher_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def validated(tmp_path_factory, teacher) -> Any:
    """The run with validations that nobody touched."""
    trainer = build_trainer(
        "dmd2", teacher, "lora", tmp_path_factory.mktemp("validated"), max_train_steps=4,
        dataset=PromptDataset([f"thing {i}" for i in range(6)]), best_metric="teacher_rmse",
        **VALIDATED,
    )  # fmt: skip
    trainer.train()
    return trainer


def validations(trainer: Any) -> list[dict[str, Any]]:
    rows = [
        json.loads(r)
        for r in (trainer.output_dir / "validation.jsonl").read_text().split("\n")[:-1]
    ]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["signal in it", "signal before it", "error"])
def test_a_validation_that_is_cut_short_is_made_up_for(run, validated, weights, kind) -> None:
    whole = validated
    trainer = run(**VALIDATED, best_metric="teacher_rmse")
    going = trainer.validator.run

    def cut(denoiser: Any, spec: Any, step: int) -> Any:
        if step == 2 and kind == "error":
            raise RuntimeError("no memory")
        if step == 2:
            signalled()
        return going(denoiser, spec, step)

    trainer.validator.run = cut
    if kind == "signal before it":
        trainer = at_step(trainer, 1, signalled)
    if kind == "error":
        with pytest.raises(RuntimeError, match="no memory"):
            trainer.train()
    else:
        trainer.train()
        assert trainer.stop.preempted
    assert names(trainer) == ["checkpoint-2"]
    assert state(trainer, 2)["owes_validation"] is True
    again = run(resume_from_checkpoint="latest", **VALIDATED, best_metric="teacher_rmse")
    again.train()
    assert student(again) == weights == student(whole)
    assert validations(again) == validations(whole)
    best = [json.loads((t.output_dir / "best.json").read_text()) for t in (again, whole)]
    assert best[0]["step"] == best[1]["step"]


@pytest.mark.full
def test_a_signal_while_the_cache_fills_keeps_what_is_encoded(
    run, tmp_path, weights, monkeypatch
) -> None:
    from stepdistill.cache import precompute

    encode, calls = precompute.encode_prompt, []

    def counted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 4:  # the first one measures
            signalled()
        return encode(*args)

    monkeypatch.setattr(precompute, "encode_prompt", counted)
    cached = {"cache_dir": str(tmp_path / "cache")}
    trainer = run(**cached)
    trainer.train()
    assert (trainer.step, trainer.stop.preempted) == (0, True)
    assert not (trainer.output_dir / "events.jsonl").exists()
    again = run(**cached)
    again.train()
    assert len(calls) == 4 + 1 + 4  # six prompts, two of which were kept
    assert student(again) == weights


def test_a_lost_launcher_stops_a_run_with_a_checkpoint(run, monkeypatch) -> None:
    trainer = run()
    monkeypatch.setattr("stepdistill.training.preemption.orphaned", lambda: trainer.step == 2)
    trainer.train()
    assert (trainer.stop.preempted, names(trainer)) == (True, ["checkpoint-2"])


# ------------------------------------------------------------------------- data
@pytest.mark.full
def test_a_killed_data_worker_costs_no_run(run, weights) -> None:
    def kill() -> None:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, signal.SIGKILL)
            worker.join()

    trainer = at_step(run(dataloader_num_workers=1), 1, kill)
    with pytest.warns(UserWarning, match="Its batch is read again"):
        trainer.train()
    assert student(trainer) == weights


@pytest.mark.full
@pytest.mark.parametrize("ends", ["finished", "error", "signal"])
def test_no_data_worker_outlives_its_run(run, ends) -> None:
    def fail() -> None:
        if ends == "error":
            raise RuntimeError("out of luck")
        if ends == "signal":
            signalled()

    trainer = at_step(run(dataloader_num_workers=1), 1, fail)
    with pytest.raises(RuntimeError, match="luck") if ends == "error" else nullcontext():
        trainer.train()
    assert multiprocessing.active_children() == []


@pytest.mark.full
def test_a_touched_prompts_file_ends_a_run_at_a_saved_step(run, tmp_path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"thing {i}\n" for i in range(6)))

    def touch() -> None:
        file.write_text("other\n")

    trainer = at_step(run(dataset=PromptDataset.from_file(file)), 1, touch)
    with pytest.raises(ValueError, match=r"prompts\.txt to stay as it was"):
        trainer.train()
    assert (trainer.step, names(trainer)) == (2, ["checkpoint-2"])
    assert trainer.log.last


def test_stopped_passes_what_handles_errors() -> None:
    assert not issubclass(Stopped, Exception)
