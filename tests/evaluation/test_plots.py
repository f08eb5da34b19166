"""Axes that always have numbers."""

import pytest

from stepdistill.evaluation.plots import round_ticks


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.5, 60.0, [2.0, 5.0, 10.0, 20.0, 50.0]),
        (1.2e-6, 9e-5, [2e-6, 5e-6, 1e-5, 2e-5, 5e-5]),
        (3e9, 3e10, [5e9, 1e10, 2e10]),
    ],
)
def test_round_numbers_of_any_size(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == ticks


def test_between_two_round_numbers_there_are_others() -> None:
    found = round_ticks(0.0265, 0.0291)
    assert 2 <= len(found) <= 6
    assert all(0.0265 <= value <= 0.0291 for value in found)
    assert found == sorted(set(found))
