"""What a comparison's folder holds so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.config.recipes import recipes
from stepdistill.storage.files import read_json

from .best_students import STUDENTS
from .curves import Curves, curves, falling
from .runs import PLAN, failures, results
from .table import Cell, Judged, caveats, cells, data_needs, recommend
from .teacher_setup import PAIRS_SECONDS, TEACHER_ROWS


@dataclass(frozen=True)
class Comparison:
    """All that the files show. runs: results' content without rows; failed: failures' content."""

    table: dict[tuple[str, int], Cell]
    base: Sequence[Judged]
    students: Sequence[Judged]
    runs: Sequence[dict[str, Any]]
    failed: Sequence[dict[str, Any]]
    needs: dict[str, str]
    facts: str
    curves: Curves
    left_out: dict[str, str]

    @property
    def teacher(self) -> dict[int, float]:
        """Steps -> Frechet distance."""
        return {r.steps: r.frechet.mean for r in self.base if r.steps and r.frechet is not None}

    @property
    def methods(self) -> list[str]:
        """Those with a finished run."""
        return list(dict.fromkeys(key[0] for key in self.table))

    @property
    def counts(self) -> list[int]:
        """The step counts of the table's columns."""
        return sorted({key[1] for key in self.table})

    @property
    def is_reference(self) -> bool:
        """Whether the teacher's own images are what all others are judged by."""
        rows = [r for r in self.base if r.group == "teacher"]
        return bool(rows) and max(rows, key=lambda r: r.steps or 0).frechet is None

    def advice(self) -> list[str]:
        """See `table.recommend`."""
        notes = falling(self.curves)
        made = recommend(self.table, self.teacher, self.needs, self.is_reference, notes)
        return made + caveats(self.table, self.failed)

    def terms(self) -> tuple[dict[str, str], list[str]]:
        """(what all runs have alike: name -> value, names of what they differ in)."""
        values: dict[str, set[str]] = {}
        for run in self.runs:
            for name, value in run.get("terms", {}).items():
                values.setdefault(name, set()).add(value)
        same = {name: next(iter(all_of)) for name, all_of in values.items() if len(all_of) == 1}
        return same, [name for name in values if name not in same]


def read(out: Path) -> Comparison:
    """What a folder holds so far. Errors: ValueError where nothing was compared in it."""
    if not (out / TEACHER_ROWS).is_file():
        raise ValueError(
            f"output_dir: expected a comparison (with {TEACHER_ROWS}), got {out}. Give --methods "
            "and --budget to make one."
        )
    finished = results(out)
    order = {name: index for index, name in enumerate(recipes())}

    def by_recipe(values: Mapping[tuple[str, int], Any]) -> dict[tuple[str, int], Any]:
        return dict(sorted(values.items(), key=lambda item: (order.get(item[0][0], 99), item[0])))

    table = by_recipe(cells(finished))
    plan = read_json(out / PLAN) if (out / PLAN).is_file() else {}
    done = {recipe for recipe, _ in table}
    runs = [
        {
            **{k: v for k, v in result.items() if k != "rows"},
            "method": result["rows"][0]["label"],
            "steps": [row["steps"] for row in result["rows"]],
        }
        for result in finished
    ]
    return Comparison(
        table=table,
        base=[_judged(out, raw) for raw in json.loads((out / TEACHER_ROWS).read_text())],
        students=[_judged(out, raw) for result in finished for raw in result["rows"]],
        runs=runs,
        failed=failures(out),
        needs=data_needs(finished),
        facts=_facts(out, finished),
        curves=by_recipe(curves(finished)),
        left_out={k: v for k, v in plan.get("left_out", {}).items() if k not in done},
    )


def _judged(out: Path, raw: Mapping[str, Any]) -> Judged:
    """A row with its pictures where they lie; those that are gone are left out."""
    previews = []
    for preview in raw["previews"]:
        if isinstance(preview, str):
            places = [place for place in (out / preview, Path(preview)) if place.is_file()]
            previews += [str(place) for place in places[:1]]
        else:
            previews.append(preview)
    return Judged.of({**raw, "previews": previews})


def _facts(out: Path, finished: Sequence[dict[str, Any]]) -> str:
    seeds = sorted({result["seed"] for result in finished})
    budgets = sorted({result.get("budget") or f"{result['seconds']:g}s" for result in finished})
    facts = []
    if finished:
        clocks = sorted({result["clock"] for result in finished if "clock" in result})
        spent = f" ({'; '.join(clocks)})" if clocks else ""
        facts.append(f"Training seeds {seeds}, {', '.join(budgets)}{spent} for each student.")
    if (out / PAIRS_SECONDS).is_file():
        seconds = json.loads((out / PAIRS_SECONDS).read_text())
        facts.append(f"The teacher's pairs, made once for all, took {seconds:.0f} s.")
    if (out / STUDENTS).is_dir():
        facts.append(f"The best seed's pipeline of each figure is kept in {STUDENTS}/.")
    return " ".join(facts)
