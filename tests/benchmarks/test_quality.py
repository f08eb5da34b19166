"""The quality bar on real data, over every recipe; about an hour a seed at the default budget.

    pytest -m benchmark -n 0 -s tests/benchmarks/test_quality.py

STEPDISTILL_QUALITY_DIR keeps (and resumes) the runs, STEPDISTILL_QUALITY_SECONDS sets the budget.
"""

import os

import pytest
from benchmarks.quality import main, verdicts

from stepdistill.comparison.table import Cell


@pytest.mark.benchmark
def test_every_method_reaches_its_bar(tmp_path) -> None:
    out = os.environ.get("STEPDISTILL_QUALITY_DIR", str(tmp_path))
    seconds = os.environ.get("STEPDISTILL_QUALITY_SECONDS", "120")
    made = main(["--output_dir", out, "--seconds", seconds])
    missed = [claim for passed, claim in made if not passed]
    assert made
    assert not missed


def test_verdicts_compare_with_the_naive_teacher_and_with_fifty_steps() -> None:
    teacher = {1: 40.0, 4: 3.0, 50: 2.0}
    table = {("a", 1): Cell(2.6, 0, 0.9, 3), ("a", 4): Cell(3.1, 0, 0.9, 3)}
    assert [passed for passed, _ in verdicts(table, teacher)] == [True, False, True, False]
