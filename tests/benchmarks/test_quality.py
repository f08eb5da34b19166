"""The quality bar on real data, over every recipe; about an hour a seed at the default budget.

    pytest -m benchmark -n 0 -s tests/benchmarks/test_quality.py

STEPDISTILL_QUALITY_DIR keeps (and resumes) the runs, STEPDISTILL_QUALITY_SECONDS sets the budget.
"""

import os

import pytest
from benchmarks.quality import Cell, cells, main, students, verdicts

from stepdistill.demo.recipes import RECIPES


@pytest.mark.benchmark
def test_every_method_reaches_its_bar(tmp_path) -> None:
    out = os.environ.get("STEPDISTILL_QUALITY_DIR", str(tmp_path))
    seconds = os.environ.get("STEPDISTILL_QUALITY_SECONDS", "120")
    missed = [
        claim for passed, claim in main(["--output_dir", out, "--seconds", seconds]) if not passed
    ]
    assert not missed


def test_every_claim_of_every_recipe_is_judged_once() -> None:
    judged = [(one.recipe, steps) for one in students() for steps in one.steps]
    claimed = [(name, steps) for name, recipe in RECIPES.items() for steps in recipe.claims]
    assert sorted(judged) == sorted(claimed)


def test_cells_average_over_training_seeds() -> None:
    def result(frechet: float, recall: float) -> dict[str, object]:
        row = {"label": "a", "steps": 1, "frechet": {"mean": frechet}, "recall": {"mean": recall}}
        return {"rows": [row]}

    made = cells([result(2.0, 0.8), result(4.0, 0.9)])
    assert made["a", 1].frechet == 3.0
    assert made["a", 1].std == pytest.approx(2**0.5)
    assert made["a", 1].recall == pytest.approx(0.85)


def test_verdicts_compare_with_the_naive_teacher_and_with_fifty_steps() -> None:
    teacher = {1: 40.0, 4: 3.0, 50: 2.0}
    table = {("a", 1): Cell(2.6, 0, 0.9, 3), ("a", 4): Cell(3.1, 0, 0.9, 3)}
    assert [passed for passed, _ in verdicts(table, teacher)] == [True, False, True, False]
