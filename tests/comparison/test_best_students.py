"""The exported students that stay, and the runs that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepdistill.comparison.best_students import best_student_folder, keep_best
from stepdistill.comparison.runs import check_finished, result_file, results
from stepdistill.comparison.students import Student


def rows(label: str, frechet: dict[int, float | None]) -> list[dict[str, Any]]:
    return [
        {"label": label, "steps": n, "frechet": None if value is None else {"mean": value}}
        for n, value in frechet.items()
    ]


def end(out: Path, seed: int, frechet: dict[int, float | None]) -> None:
    """A run of method "a" that was judged so."""
    work = out / f"work_{seed}"
    for steps in frechet:
        (work / str(steps)).mkdir(parents=True)
        (work / str(steps) / "seed").write_text(str(seed))
    made = rows("a", frechet)
    keep_best(out, results(out), made, lambda steps: work / str(steps))
    file = result_file(out, Student("a", tuple(frechet)), seed)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"rows": made, "settings": "one"}))


def test_each_step_count_keeps_its_best_seed_s_pipeline(tmp_path) -> None:
    end(tmp_path, 0, {1: 3.0, 4: None})
    end(tmp_path, 1, {1: 5.0, 4: 2.0})
    end(tmp_path, 2, {1: 2.0, 4: 2.5})
    kept = {n: (best_student_folder(tmp_path, "a", n) / "seed").read_text() for n in (1, 4)}
    assert kept == {1: "2", 4: "1"}


class Settings:
    """A setup whose students have that digest."""

    def __init__(self, digest: str) -> None:
        self.told = digest

    def digest(self, student: Student) -> str:
        return self.told


def test_a_finished_run_of_other_settings_is_not_taken_for_this_one(tmp_path) -> None:
    end(tmp_path, 0, {1: 3.0, 4: 2.0})
    one, other = Settings("one"), Settings("other")
    chosen = [Student("a", (1, 4))]
    check_finished(tmp_path, one, chosen, [0, 1])  # type: ignore[arg-type]
    check_finished(tmp_path, other, chosen, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"methods: expected a with the settings of its finished"):
        check_finished(tmp_path, other, chosen, [0])  # type: ignore[arg-type]


def test_a_seed_is_not_counted_twice_at_one_step_count(tmp_path) -> None:
    end(tmp_path, 0, {1: 3.0, 4: 2.0})
    with pytest.raises(ValueError, match=r"steps: expected \[1, 4\] for a .*got \[4\]: one seed"):
        check_finished(tmp_path, Settings("one"), [Student("a", (4,))], [0])  # type: ignore[arg-type]
    check_finished(tmp_path, Settings("one"), [Student("a", (2,))], [0])  # type: ignore[arg-type]
    check_finished(tmp_path, Settings("one"), [Student("b", (4,))], [0])  # type: ignore[arg-type]
