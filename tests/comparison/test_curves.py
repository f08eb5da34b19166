"""Readings on the way, what they say at the end of a budget, and their files."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest
from comparison.test_report import folder, row  # noqa: F401
from evaluation.test_evaluate import Page
from PIL import Image

from stepdistill.comparison.curves import curves, falling
from stepdistill.comparison.report import write


def result(seed: int, *frechet: float, std: float = 0.0) -> dict[str, Any]:
    """A run of one step, judged at a quarter and half, and at the end."""
    *way, end = frechet
    rows = [{"steps": 1, "frechet": {"mean": f, "std": std}, "recall": None} for f in way]
    points = [
        {"share": share, "updates": n, "seconds": n + 0.5 + seed, "rows": [made]}
        for share, n, made in zip((0.25, 0.5), (10, 20), rows, strict=True)
    ]
    facts = {"updates": [8, 32], "cpu_seconds": 41.0 + seed, "seconds": 40.0, "seed": seed}
    return {**facts, "curve": points, "rows": [{**row("a", "student", 1, end), "label": "a"}]}


def test_readings_are_means_over_seeds_with_the_end() -> None:
    (key,) = made = curves([result(0, 8.0, 4.0, 2.0), result(1, 10.0, 6.0, 3.0)])
    assert key == ("a", 1)
    assert [reading.cell.frechet for reading in made[key]] == [9.0, 5.0, 2.5]
    assert [reading.cell.seconds for reading in made[key]] == [11.0, 21.0, 41.5]
    assert [reading.updates for reading in made[key]] == [10, 20, 40]
    assert made[key][0].each == [(0, 10, 10.5, 8.0), (1, 10, 11.5, 10.0)]


def test_earlier_results_have_no_curve() -> None:
    plain = result(0, 8.0, 4.0, 2.0)
    del plain["curve"]
    assert curves([plain, {**result(1, 8.0, 4.0, 2.0), "curve": []}]) == {}


def test_a_step_count_not_reached_yet_has_fewer_readings() -> None:
    one = result(0, 8.0, 4.0, 2.0)
    one["curve"][0]["rows"] = []
    assert [reading.share for reading in curves([one])["a", 1]] == [0.5, 1.0]
    one["curve"][1]["rows"] = []
    (readings,) = (made := curves([one])).values()
    assert [reading.share for reading in readings] == [1.0]
    assert falling(made) == {}


@pytest.mark.parametrize(("end", "told"), [(2.0, True), (3.9, False), (5.0, False)])
def test_still_falling_is_a_drop_above_the_noise(end, told) -> None:
    """Each has a standard error of 1 / sqrt(5) of its noise seeds at half, 0.3 / sqrt(5) then."""
    found = falling(curves([result(0, 8.0, 4.0, end, std=1.0)]))
    text = "still falling at the end of the budget (4.00 at 0.5 of it): raise it"
    assert found == ({("a", 1): text} if told else {})


def test_nothing_is_said_where_the_noise_is_unknown() -> None:
    one = result(0, 8.0, 4.0, 2.0)
    one["rows"][0]["frechet"]["std"] = 0.0
    assert falling(curves([one])) == {}


@pytest.mark.full
def test_report_draws_them_and_says_so(folder) -> None:  # noqa: F811
    for seed in (0, 1):
        made = result(seed, 8.0, 4.0, 1.5 + 0.1 * seed)
        (folder / "results" / f"a_1_seed{seed}.json").write_text(json.dumps(made))
    found = write(folder)
    assert found.advice()[1].endswith(
        "; a is still falling at the end of the budget (4.00 at 0.5 of it): raise it."
    )
    with (folder / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["seed"], float(r["share"]), float(r["frechet"])) for r in rows] == [
        ("0", 0.25, 8.0), ("1", 0.25, 8.0), ("0", 0.5, 4.0), ("1", 0.5, 4.0),
        ("0", 1.0, 1.5), ("1", 1.0, 1.6),
    ]  # fmt: skip
    page = Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert page.tags.count("img") == 2 + 2 + page_pictures(folder, found)
    with Image.open(folder / "curves.png") as image:
        assert image.size == (1500, 420)


def page_pictures(folder: Any, found: Any) -> int:  # noqa: F811
    """Pictures of the gallery: two rows of digits for the teacher twice, dmd2 and a."""
    return 2 * (2 + len(found.table))


@pytest.mark.full
def test_without_curves_nothing_is_left_over(folder) -> None:  # noqa: F811
    write(folder)
    assert not (folder / "curves.png").exists()
    assert "Quality while training" not in (folder / "report.html").read_text(encoding="utf-8")
