"""Charts: round axes, few points, lines where they belong."""

import re

import pytest

from stepdistill.reporting.charts import line_chart, log_ticks, thinned, ticks
from stepdistill.reporting.values import short


def test_points_are_thinned_to_means() -> None:
    points = [(float(i), 2.0 * i) for i in range(1000)]
    few = thinned(points, 100)
    assert len(few) == 100
    assert few[0] == (4.5, 9.0)
    assert thinned([(0.0, float("nan")), (1.0, 2.0)]) == [(1.0, 2.0)]


def test_ticks_are_round() -> None:
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3.0, 47.0) == [10, 20, 30, 40]
    assert log_ticks(0.02, 3.0) == pytest.approx([0.1, 1.0])
    assert log_ticks(0.9, 60.0) == pytest.approx([1, 2, 5, 10, 20, 50])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1200.0, "1200"), (25000.0, "25k"), (0.00012, "1.2e-4"), (0.5, "0.5"),
     (3.14159, "3.142"), (-0.25, "-0.25"), (2e7, "2e7")],
)  # fmt: skip
def test_numbers_are_short(value, text) -> None:
    assert short(value) == text


def test_a_line_runs_from_corner_to_corner() -> None:
    svg = line_chart("t", {"a": [(0.0, 1.0), (10.0, 1000.0)]})  # a logarithmic axis
    (path,) = re.findall(r'points="(.*?)"', svg)
    assert path == "58.0,212.0 468.0,10.0"


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart("t", {"a": [], "b": [(0.0, float("nan"))]}) == ""


def test_alarms_are_marked() -> None:
    svg = line_chart("t", {"a": [(0.0, 1.0), (10.0, 2.0)]}, marks=[5.0, 99.0])
    assert svg.count('class="mark"') == 1
    assert 'class="mark" x1="263.0"' in svg


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.5, 60.0, [2.0, 5.0, 10.0, 20.0, 50.0]),
        (1.2e-6, 9e-5, [2e-6, 5e-6, 1e-5, 2e-5, 5e-5]),
        (3e9, 3e10, [5e9, 1e10, 2e10]),
    ],
)
def test_round_numbers_of_any_size(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == expected


def test_between_two_round_numbers_there_are_others() -> None:
    found = log_ticks(0.0265, 0.0291)
    assert 2 <= len(found) <= 6
    assert all(0.0265 <= value <= 0.0291 for value in found)
    assert found == sorted(set(found))
