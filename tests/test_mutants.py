"""The mutation tool finds every operator once, and its list of equivalents is today's."""

from __future__ import annotations

from pathlib import Path

import mutants

SOURCE = '''
from __future__ import annotations

def f(x: dict[str, -1], n: int = -2) -> int:
    """a - b"""
    y = x ** 2 + n % 3
    y *= n // 2
    return y if 0 < n <= y is not None else [y] * (y not in (1, 2))

class C:
    def g(self, a, b):
        return a - b / 2 == a - b
'''


def test_each_operator_and_comparison_once(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    path = tmp_path / "core" / "some.py"
    path.write_text(SOURCE)
    made = mutants.mutants_of(path)
    assert made[0].code().co_filename == str(path)
    assert sorted(mutant.id.partition(": ")[2] for mutant in made) == sorted(
        [
            "-2 -> +2",
            "x ** 2 + n % 3 -> x ** 2 - n % 3",
            "x ** 2 -> x * 2",
            "n % 3 -> n // 3",
            "y *= n // 2 -> y /= n // 2",
            "n // 2 -> n / 2",
            "0 < n <= y is not None -> 0 <= n <= y is not None",
            "0 < n <= y is not None -> 0 < n < y is not None",
            "0 < n <= y is not None -> 0 < n <= y is None",
            "[y] * (y not in (1, 2)) -> [y] / (y not in (1, 2))",
            "y not in (1, 2) -> y in (1, 2)",
            "a - b / 2 == a - b -> a - b / 2 != a - b",
            "a - b / 2 -> a + b / 2",
            "b / 2 -> b * 2",
            "a - b -> a + b",
        ]
    )


def test_quick_tests_come_first_and_the_slow_ones_may_be_left_out(tmp_path: Path) -> None:
    mutant = mutants.Mutant(tmp_path / "core" / "some.py", "", 0, 3, "id")
    seconds = {"test_a.py::slow": 9.0, "test_a.py::quick": 1.0, "d/test_some.py::named": 5.0}
    seen = mutants.Seen({**seconds, "test_a.py::elsewhere": 0.1})
    seen.lines[f"{mutant.path}:3"] = set(seconds)
    order = ["d/test_some.py::named", "test_a.py::quick", "test_a.py::slow"]
    assert seen.tests_of(mutant, float("inf")) == (order, True)
    assert seen.tests_of(mutant, 6.5) == (order[:2], False)
    assert seen.tests_of(mutant, 0.5) == (order[:1], False)


def test_equivalent_mutants_are_still_there_and_have_a_reason() -> None:
    there = {
        mutant.id for path in mutants.files_of(list(mutants.ROOMS))
        for mutant in mutants.mutants_of(path)
    }  # fmt: skip
    assert set(mutants.equivalents()) <= there
    assert all(len(reason) > 20 for reason in mutants.equivalents().values())
