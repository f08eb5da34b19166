"""The four answers at the top of a run's report, from records of known content."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill.monitoring.records import RunRecords
from stepdistill.monitoring.run_answers import answers


def run(folder: Path = Path("out"), **more) -> RunRecords:
    facts = {"train_config": {"max_train_steps": 100, **more.pop("config", {})}}
    log = more.pop("log", [{"step": 20, "seconds": 10.0, "steps_per_second": 2.0}])
    known = {"validations": [], "alarms": [], "end": None, "best": None, **more}
    return RunRecords(folder, facts, log, **known)


def end(state: str) -> dict:
    return {"state": state, "why": "", "step": 20}


@pytest.mark.parametrize(
    ("values", "word", "told"),
    [
        ([2.0, 1.0], "yes", "Fréchet distance 2 at 0, 1 at 10"),
        ([2.0, 1.95], "level", "Fréchet distance 2 at 0, 1.95 at 10"),
        ([2.0, 2.3], "no", "Fréchet distance 2 at 0, 2.3 at 10"),
        ([2.0, 0.5, 1.0], "yes", "Fréchet distance 2 at 0, 1 at 20, 0.5 at 10"),
        ([2.0], "not known", "Fréchet distance 2 at 0"),
    ],
)
def test_learning_is_a_distance_that_fell_by_a_tenth(values, word, told) -> None:
    rows = [
        {"step": 10 * k, "frechet_diagonal": v, "teacher_rmse": 9.0} for k, v in enumerate(values)
    ]
    assert answers(run(validations=rows))[0][1:] == (word, "Is it learning?", told)


def test_without_a_validation_nothing_is_said_to_be_known() -> None:
    assert answers(run())[0][3] == "--validation_steps measures it"
    planned = run(config={"validation_steps": 50})
    assert answers(planned)[0][3] == "the first validation is to come"


@pytest.mark.parametrize(
    ("config", "told"),
    [({}, "0 min 40 s"), ({"max_train_seconds": 25.0}, "0 min 15 s"),
     ({"max_train_seconds": 8000.0}, "0 min 40 s"),
     ({"max_train_seconds": 9000.0, "max_train_steps": 40_000}, "2 h 29 min")],
)  # fmt: skip
def test_time_left_is_that_of_the_budget_that_ends_first(config, told) -> None:
    assert answers(run(config=config))[1][3] == told


def test_a_run_without_a_log_line_knows_no_end() -> None:
    assert answers(run(log=[]))[1][3] == "not known yet"


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({}, "not known"),
        ({"validations": [{"step": 0, "diversity_ratio": 0.9}]}, "yes"),
        ({"validations": [{"step": 0, "diversity_ratio": 0.1}]}, "look"),
        ({"validations": [{"step": 0, "saturation_excess": 0.4}]}, "look"),
        ({"alarms": [{"step": 3, "line": "watchdog: ..."}]}, "look"),
    ],
)
def test_it_looks_right_where_nothing_is_off(more, word) -> None:
    assert answers(run(**more))[2][1] == word


@pytest.mark.parametrize(
    ("state", "told"),
    [("preempted", "--resume_from_checkpoint latest"), ("interrupted", "--resume_from_checkpoint"),
     ("failed", "--resume_from_checkpoint"), ("stopped by the watchdog", "reason above"),
     ("finished", "stepdistill export 'an out' OUT")],
)  # fmt: skip
def test_what_now_follows_how_it_ended(state, told) -> None:
    assert told in answers(run(Path("an out"), end=end(state)))[3][3]


def test_a_finished_run_s_pipeline_is_there_to_be_tried(tmp_path) -> None:
    (tmp_path / "pipeline").mkdir()
    told = answers(run(tmp_path, end=end("finished")))[3][3]
    assert told == f"stepdistill sample {tmp_path / 'pipeline'} --prompt ..."
