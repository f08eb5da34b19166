"""Every method that has a recipe, on the demo's emoji, three minutes of one core a student.

    python tests/benchmarks/same_budget.py runs/emoji            # train what is missing: core-hours
    python tests/benchmarks/same_budget.py runs/emoji --keep     # its rows and pictures, into here

The rows are kept in tests/benchmarks/emoji, a comparison's folder without its pictures: the tables
of README.md and stepdistill/methods/README.md are made of it, and `stepdistill compare` goes on
where it stops. One seed after the other, so that a stop leaves whole ones behind.
"""

# Tables: method -> a cell for each number of steps.

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from stepdistill.comparison.results import Comparison, read
from stepdistill.comparison.students import served_by_recipes
from stepdistill.comparison.table import Cell
from stepdistill.reporting.pictures import contact

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).with_name("emoji")
PICTURES = ROOT / ".github" / "methods"
STEPS = (1, 2, 4, 8)
SHOWN = 14  # pictures of a method
BUDGET = "180s"
POINTS = 3  # that the first seed's students are judged at on their way


def table(comparison: Comparison, spread: bool = True) -> list[str]:
    """Lines of Markdown: Frechet distance and, in brackets, recall; the teacher's first.

    Args: spread: with deviations over training seeds, where there are several.
    """
    rows: dict[str, dict[int, str]] = {"teacher": {}}
    for one in comparison.base:
        if one.group == "teacher" and one.steps in STEPS and one.frechet and one.recall:
            rows["teacher"][one.steps] = f"{one.frechet.mean:.2f} ({one.recall.mean:.2f})"
    for (name, steps), cell in comparison.table.items():
        rows.setdefault(f"`{name}`", {})[steps] = _cell(cell, spread)
    columns = [steps for steps in STEPS if any(steps in row for row in rows.values())]
    titles = ["1 step" if steps == 1 else f"{steps} steps" for steps in columns]
    return [
        f"| | {' | '.join(titles)} |",
        f"|---|{'---|' * len(columns)}",
        *(
            f"| {name} | {' | '.join(row.get(steps, '') for steps in columns)} |"
            for name, row in rows.items()
        ),
    ]


def _cell(cell: Cell, spread: bool) -> str:
    deviation = f" ± {cell.std:.2f}" if spread and cell.num_seeds > 1 else ""
    return f"{cell.frechet:.2f}{deviation} ({cell.recall:.2f})"


def keep(folder: Path) -> None:
    """Copy rows and facts to KEPT, curves and a strip of each method's fewest steps to PICTURES."""
    shutil.copytree(folder / "results", KEPT / "results", dirs_exist_ok=True)
    for name in ("comparison.json", "teacher_rows.json", "pairs_seconds.json"):
        shutil.copy(folder / name, KEPT / name)
    PICTURES.mkdir(exist_ok=True)
    shutil.copy(folder / "curves.png", PICTURES.parent / "curves.png")
    comparison, drawn = read(folder), set[str]()
    for one in sorted(comparison.students, key=lambda one: one.steps or 0):
        if one.label not in drawn and one.previews:
            drawn.add(one.label)
            _strip(one.previews[:SHOWN]).save(PICTURES / f"{one.label}.webp", quality=80, method=6)
    (teacher,) = (o for o in comparison.base if o.group == "teacher" and o.steps == 50)
    _strip(teacher.previews[:SHOWN]).save(PICTURES / "teacher.webp", quality=80, method=6)


def _strip(pictures: Sequence[str]) -> Image.Image:
    return Image.fromarray(contact(pictures))


def train(folder: Path, seeds: Sequence[int]) -> None:
    """Each method at its fewest steps (one student for all counts at all of them), seed by seed,
    then at its other counts with the first seed; those that are done are left as they are."""
    fewest: dict[int | None, list[str]] = {}
    more: dict[int | None, list[str]] = {}
    for name, served in served_by_recipes().items():
        first, *others = (None,) if served.one_student else sorted(served.claims)
        fewest.setdefault(first, []).append(name)
        for steps in others:
            more.setdefault(steps, []).append(name)
    for seed, groups in [*((seed, fewest) for seed in seeds), (seeds[0], more)]:
        for steps, methods in groups.items():
            count = () if steps is None else ("--steps", str(steps))
            points = POINTS if seed == seeds[0] and groups is fewest else 1
            subprocess.run(
                ["stepdistill", "compare", "--output_dir", str(folder), "--budget", BUDGET,
                 "--processes", "1", "--curve_points", str(points),
                 "--seeds", str(seed), *count, "--methods", ",".join(methods)],
                check=True,
            )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", action="store_true", help="train nothing, keep what is there")
    options = parser.parse_args(argv)
    if not options.keep:
        train(options.folder, options.seeds)
    keep(options.folder)
    print("\n".join(table(read(KEPT))))


if __name__ == "__main__":
    main()
