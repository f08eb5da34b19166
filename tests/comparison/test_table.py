"""Cells, what can be told apart, and advice with its reason."""

from typing import Any

import pytest

from stepdistill.comparison.table import Cell, caveats, cells, peers, recommend


def result(label: str, steps: int, frechet: float, std: float = 0.0, **more: Any) -> dict[str, Any]:
    row = {"label": label, "steps": steps, "frechet": {"mean": frechet, "std": std}}
    return {"rows": [{**row, "recall": {"mean": 0.8, "std": 0.0}}], "cpu_seconds": 4.0, **more}


def test_cells_average_over_training_seeds() -> None:
    made = cells([result("a", 1, 2.0), result("a", 1, 4.0), result("b", 1, 5.0, std=1.0)])
    assert made["a", 1].frechet == 3.0
    assert made["a", 1].std == pytest.approx(2**0.5)
    assert made["a", 1].error == pytest.approx(1.0)
    assert made["b", 1].error == pytest.approx(5**-0.5)  # of its five noise seeds
    assert (made["a", 1].seconds, made["a", 1].num_seeds) == (4.0, 2)


def test_peers_are_those_within_the_error_of_the_difference() -> None:
    table = {
        ("a", 1): Cell(2.0, 0.3, 0.8, 1),
        ("b", 1): Cell(2.4, 0.4, 0.8, 1),
        ("c", 1): Cell(2.7, 0.4, 0.8, 1),
        ("d", 2): Cell(1.0, 0.0, 0.8, 1),
    }
    assert peers(table, 1) == ["a", "b"]


def test_advice_is_the_fewest_steps_that_reach_the_teacher() -> None:
    table = {
        ("a", 1): Cell(3.0, 0.0, 0.8, 3),
        ("b", 2): Cell(2.1, 0.0, 0.8, 3),
        ("c", 4): Cell(1.9, 0.0, 0.8, 3),
    }
    first, *rest = recommend(table, {1: 40.0, 2: 8.0, 50: 2.0})
    assert first.startswith("Take b at 2 steps: the fewest steps within 10% of the teacher's 50")
    assert "(2.10 against 2.00)" in first
    assert rest[0] == (
        "1 step: a (3.00, recall 0.80; the teacher 40.00 there, 1.50 times its 50 steps)."
    )


def test_advice_says_when_none_is_near_or_better() -> None:
    table = {("a", 1): Cell(50.0, 0.0, 0.0, 1)}
    first, second = recommend(table, {1: 40.0, 50: 2.0})
    assert "25.00 times it); none comes within 10% at this budget" in first
    assert "no student beats the teacher at this step count" in second


def test_of_equals_the_one_that_needs_least_data_is_named() -> None:
    table = {("a", 1): Cell(2.0, 0.5, 0.8, 1), ("b", 1): Cell(2.1, 0.5, 0.8, 1)}
    lines = recommend(table, {50: 2.0}, {"a": "pairs", "b": "prompts"})
    assert lines[1].endswith(
        "not told apart from it by these runs: b, of which b needs prompts alone."
    )


def test_where_the_teacher_is_the_reference_the_nearest_is_advised() -> None:
    table = {("a", 1): Cell(0.05, 0.0, 0.8, 1), ("b", 2): Cell(0.0123, 0.0, 0.8, 1)}
    first, *rest = recommend(table, {1: 0.4}, is_reference=True)
    assert first == "Take b at 2 steps: the nearest to the teacher (0.0123)."
    assert rest[0] == "1 step: a (0.05, recall 0.80; the teacher 0.4 there)."


def test_nothing_finished_is_said() -> None:
    assert recommend({}, {50: 2.0}) == ["No run has finished: there is nothing to recommend."]


def test_from_one_run_of_one_noise_nothing_is_known_of_scatter() -> None:
    alone = result("a", 1, 2.0)
    alone["rows"][0]["noise_seeds"] = 1
    other = result("b", 1, 2.1)
    made = cells([alone, other])
    assert made["a", 1].error != made["a", 1].error
    assert peers(made, 1) == ["a"]
    assert caveats(made)[0].startswith("Scatter: not known, from one training seed")
    assert caveats(cells([alone, {**alone, "seed": 1}])) == []
    noisy = result("a", 1, 2.0, std=1.0)
    noisy["rows"][0]["noise_seeds"] = 4
    assert cells([noisy])["a", 1].error == 0.5


def test_failed_runs_are_told_beside_the_advice() -> None:
    failed = [{"recipe": "vsd", "steps": [1], "seed": seed, "error": "x"} for seed in (1, 2)]
    assert caveats({}, failed) == ["Failed: vsd for 1 (2 seeds), and not in these figures."]
