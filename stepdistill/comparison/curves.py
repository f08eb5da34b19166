"""Quality against training, within runs: what each student was worth on its way.

A student at half the budget is one of the longer run: under a falling learning rate it has not had
its quiet end, and a run of half the budget may do better.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.reporting.values import decimals

from .table import Cell, cells


@dataclass(frozen=True)
class Reading:
    """A method at one step count, at one share of the budget. cell: over training seeds; updates:
    their mean; each: (seed, updates, seconds, Frechet distance)."""

    share: float
    cell: Cell
    updates: float
    each: Sequence[tuple[int, int, float, float]]


Curves = Mapping[tuple[str, int], Sequence[Reading]]


def curves(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[Reading]]:
    """(method, steps) -> readings by share, of the runs that were judged on the way.

    A step count that the student's grid had not reached has no reading there; the end has one.
    """
    by_share: dict[float, list[dict[str, Any]]] = {}
    for result in results:
        points = result.get("curve") or []
        if points:
            label, seed = result["rows"][0]["label"], result["seed"]
            end = {
                "share": 1.0,
                "updates": sum(result["updates"]),
                "seconds": result["cpu_seconds"],
                "rows": result["rows"],
            }
            for point in (*points, end):
                rows = [{**row, "label": label} for row in point["rows"]]
                facts = {"updates": point["updates"], "cpu_seconds": point["seconds"]}
                made: dict[str, Any] = {**facts, "rows": rows, "seed": seed}
                by_share.setdefault(point["share"], []).append(made)
    readings: dict[tuple[str, int], list[Reading]] = {}
    for share, all_of in sorted(by_share.items()):
        for key, cell in cells(all_of).items():
            each = [
                (one["seed"], one["updates"], one["cpu_seconds"], row["frechet"]["mean"])
                for one in all_of
                for row in one["rows"]
                if (row["label"], row["steps"]) == key and row["frechet"] is not None
            ]
            mean = statistics.fmean(updates for _, updates, _, _ in each)
            readings.setdefault(key, []).append(Reading(share, cell, mean, each))
    return readings


def falling(measured: Curves) -> dict[tuple[str, int], str]:
    """(method, steps) -> what to say of those that the last part of the budget made better by more
    than the standard error of the difference; none where a single seed of each kind hides that.
    """
    notes = {}
    for key, readings in measured.items():
        if len(readings) < 2:
            continue
        before, end = readings[-2], readings[-1]
        drop = before.cell.frechet - end.cell.frechet
        noise = math.hypot(before.cell.error, end.cell.error)
        if end.share == 1.0 and drop > noise > 0:
            notes[key] = (
                f"still falling at the end of the budget ({decimals(before.cell.frechet)} at "
                f"{before.share:.3g} of it): raise it"
            )
    return notes


def rows_of(measured: Curves) -> list[dict[str, Any]]:
    """A row for each student and point, for CSV."""
    return [
        {"recipe": recipe, "steps": steps, "seed": seed, "share": reading.share,
         "updates": updates, "seconds": round(seconds, 3), "frechet": frechet}
        for (recipe, steps), readings in measured.items()
        for reading in readings
        for seed, updates, seconds, frechet in reading.each
    ]  # fmt: skip
