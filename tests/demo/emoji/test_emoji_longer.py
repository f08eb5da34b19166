"""The report's line about an hour: measured figures, where they are of the run's own kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepdistill.demo.emoji.data import SHIPPED
from stepdistill.demo.emoji.longer import HOUR, an_hour
from stepdistill.demo.emoji.subject import EmojiSubject
from stepdistill.demo.metrics import Row
from stepdistill.demo.subject import Digits

RAW = Path(__file__).parents[2] / "benchmarks" / "emoji_hour" / "dmd2_1_seed0.json"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return Row.load_all(SHIPPED / "judged.json")


def test_the_line_is_the_measured_row_beside_the_run_s_own_teacher(rows) -> None:
    had = json.loads(HOUR.read_text())
    (fifty,) = (row.frechet.mean for row in rows if row.steps == 50)
    ((name, line),) = an_hour(rows, "dmd2")
    assert name == "an hour gives"
    assert f"Fréchet {had['frechet']:.2f}, {had['frechet'] / fifty:.2f} × the teacher's" in line
    assert f"recall {had['recall']:.2f}" in line
    assert line.endswith("yours: --seconds 3600")


def test_its_figures_are_those_of_the_comparison_that_measured_them() -> None:
    had, raw = json.loads(HOUR.read_text()), json.loads(RAW.read_text())
    (row,) = raw["rows"]
    assert (had["frechet"], had["recall"]) == (row["frechet"]["mean"], row["recall"]["mean"])
    assert (had["method"], had["steps"], had["seed"]) == (row["label"], row["steps"], raw["seed"])
    assert (had["seconds"], raw["budget"]) == (raw["seconds"], "3600s")


@pytest.mark.parametrize(
    ("subject", "method", "student"),
    [(EmojiSubject, "reflow", "full"), (EmojiSubject, "dmd2", "lora"), (Digits, "dmd2", "full")],
)
def test_another_run_is_told_nothing(rows, subject, method, student) -> None:
    assert subject().more_time(rows, method, student) == []
    assert EmojiSubject().more_time(rows, "dmd2", "full") == an_hour(rows, "dmd2") != []


def test_another_teacher_is_told_nothing(rows, tmp_path) -> None:
    subject = EmojiSubject()
    subject.source = tmp_path
    assert subject.more_time(rows, "dmd2", "full") == []
    assert an_hour([row for row in rows if row.steps != 50], "dmd2") == []
