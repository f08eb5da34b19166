"""What a comparison's folder holds so far."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.config.recipes import recipes
from stepdistill.storage.files import read_json

from .curves import Curves, curves, falling
from .ground import PAIRS_SECONDS, TEACHER_ROWS
from .kept import KEPT
from .runs import PLAN, failures, results
from .table import Cell, Judged, caveats, cells, data_needs, recommend


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
        own = [r for r in self.base if r.group == "teacher"]
        return bool(own) and max(own, key=lambda r: r.steps or 0).frechet is None

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
    kept = out / TEACHER_ROWS
    if not kept.is_file():
        raise ValueError(
            f"output_dir: expected a comparison (with {TEACHER_ROWS}), got {out}. Give --methods "
            "and --budget to make one."
        )
    found = results(out)
    base = [_judged(out, raw) for raw in json.loads(kept.read_text())]
    students = [_judged(out, raw) for result in found for raw in result["rows"]]
    order = {name: index for index, name in enumerate(recipes())}

    def sorted_by_recipe(values: dict[tuple[str, int], Any]) -> dict[tuple[str, int], Any]:
        return {key: values[key] for key in sorted(values, key=lambda k: (order.get(k[0], 99), k))}

    table, ways = sorted_by_recipe(cells(found)), sorted_by_recipe(curves(found))
    runs = [{k: v for k, v in result.items() if k != "rows"} for result in found]
    for run, result in zip(runs, found, strict=True):
        run["method"] = result["rows"][0]["label"]
        run["steps"] = [row["steps"] for row in result["rows"]]
    facts = _facts(out, found)
    needs, failed = data_needs(found), failures(out)
    plan = read_json(out / PLAN) if (out / PLAN).is_file() else {}
    absent = {
        k: v for k, v in plan.get("left_out", {}).items() if k not in {key[0] for key in table}
    }
    return Comparison(table, base, students, runs, failed, needs, facts, ways, absent)


def _judged(out: Path, raw: Mapping[str, Any]) -> Judged:
    """A row with its pictures where they lie; those that are gone are left out."""
    kept = []
    for preview in raw["previews"]:
        if isinstance(preview, str):
            places = [place for place in (out / preview, Path(preview)) if place.is_file()]
            kept += [str(place) for place in places[:1]]
        else:
            kept.append(preview)
    return Judged.of({**raw, "previews": kept})


def _facts(out: Path, found: Sequence[dict[str, Any]]) -> str:
    seeds = sorted({result["seed"] for result in found})
    budgets = sorted({result.get("budget") or f"{result['seconds']:g}s" for result in found})
    told = f"Training seeds {seeds}, {', '.join(budgets)} for each student." if found else ""
    took = out / PAIRS_SECONDS
    if took.is_file():
        told += (
            f" The teacher's pairs, made once for all, took {json.loads(took.read_text()):.0f} s."
        )
    if (out / KEPT).is_dir():
        told += f" The best seed's pipeline of each figure is kept in {KEPT}/."
    return told.strip()
