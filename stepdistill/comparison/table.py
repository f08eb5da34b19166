"""From runs to cells, and from cells to a recommendation that says why."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from stepdistill.core.options import Data
from stepdistill.reporting.values import Measured, counted, decimals

DATA_ORDER = get_args(Data)  # the less to bring, the earlier
_NOISE_SEEDS = 5  # of rows that do not say: an earlier version's
NEAR = 1.1  # a student within that factor of the teacher's best is as good as it, for advice


@dataclass(frozen=True)
class Judged:
    """One judged sampler. group: "real", "teacher" or "student"; previews: as the judge left them,
    paths of pictures or (digits) numbers in [-1, 1]."""

    label: str
    group: str
    steps: int | None
    frechet: Measured | None
    recall: Measured | None
    network_calls: float | None
    seconds_per_image: float | None
    previews: Sequence[Any]

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Judged:
        """A row as JSON holds it; other figures are left out."""
        spreads = {
            name: None if raw.get(name) is None else Measured(**raw[name])
            for name in ("frechet", "recall")
        }
        names = ("label", "group", "steps", "network_calls", "seconds_per_image", "previews")
        return cls(**{name: raw.get(name) for name in names}, **spreads)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Cell:
    """One method at one step count. frechet, std, recall: over training seeds; noise: standard
    error of one run's value, by its noise seeds (0 where there is one); seconds: of training."""

    frechet: float
    std: float
    recall: float
    num_seeds: int
    noise: float = 0.0
    seconds: float = 0.0

    @property
    def error(self) -> float:
        """Standard error of the mean, of training seeds or (where there is one) of noise; NaN
        where there is one of each, from which nothing can be told."""
        if self.num_seeds == 1 and max(self.std, self.noise) == 0.0:
            return math.nan
        return max(self.std, self.noise) / math.sqrt(self.num_seeds)


Table = Mapping[tuple[str, int], Cell]


def cells(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], Cell]:
    """(method, steps) -> Cell of the results' rows."""
    groups: dict[tuple[str, int], list[tuple[Mapping[str, Any], float]]] = {}
    for result in results:
        for row in result["rows"]:
            if row["frechet"] is not None:
                spent = float(result.get("cpu_seconds", 0.0))
                groups.setdefault((row["label"], row["steps"]), []).append((row, spent))
    made = {}
    for key, rows in groups.items():
        frechet = [row["frechet"]["mean"] for row, _ in rows]
        recall = [row["recall"]["mean"] for row, _ in rows if row["recall"] is not None]
        made[key] = Cell(
            statistics.fmean(frechet),
            statistics.stdev(frechet) if len(frechet) > 1 else 0.0,
            statistics.fmean(recall) if recall else math.nan,
            len(rows),
            statistics.fmean(_noise(row) for row, _ in rows),
            statistics.fmean(spent for _, spent in rows),
        )
    return made


def _noise(row: Mapping[str, Any]) -> float:
    """Standard error of one run's mean over its noise seeds."""
    return float(row["frechet"].get("std", 0.0) / math.sqrt(row.get("noise_seeds", _NOISE_SEEDS)))


def data_needs(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Method -> the data its last training read, where the runs say so."""
    return {
        row["label"]: result["data"]
        for result in results
        if "data" in result
        for row in result["rows"]
    }


def peers(table: Table, steps: int) -> list[str]:
    """The best method at that step count, then those whose distance differs from its by less than
    the standard error of the difference."""
    at_steps = {key[0]: cell for key, cell in table.items() if key[1] == steps}
    order = sorted(at_steps, key=lambda name: at_steps[name].frechet)
    best = at_steps[order[0]]
    return (
        order[:1]
        + [  # a NaN error is in no comparison
            name
            for name in order[1:]
            if at_steps[name].frechet - best.frechet <= math.hypot(at_steps[name].error, best.error)
        ]
    )


def run_name(method: str, steps: Sequence[int]) -> str:
    """Such as "lcm for 1/2"."""
    return f"{method} for {'/'.join(map(str, steps))}"


def caveats(table: Table, failed: Sequence[Mapping[str, Any]] = ()) -> list[str]:
    """What the advice does not know, as sentences that begin with their subject.

    Args: failed: see runs.failures.
    """
    made = []
    if any(math.isnan(cell.error) for cell in table.values()):
        made.append(
            "Scatter: not known, from one training seed and one noise seed. Differences may be "
            "chance; --seeds 0 1 2 shows how much."
        )
    tried: dict[str, int] = {}
    for one in failed:
        name = run_name(one["recipe"], one["steps"])
        tried[name] = tried.get(name, 0) + 1
    if tried:
        runs = ", ".join(f"{name} ({counted(times, 'seed')})" for name, times in tried.items())
        made.append(f"Failed: {runs}, and not in these figures.")
    return made


def recommend(
    table: Table,
    teacher: Mapping[int, float],
    needs: Mapping[str, str] | None = None,
    is_reference: bool = False,
    notes: Mapping[tuple[str, int], str] | None = None,
) -> list[str]:
    """Sentences: what to take at each step count and, first, over all, each with its numbers.

    Args: teacher: steps -> Frechet distance; needs: see `data_needs`; is_reference: the
        distances are to the teacher's images at most steps: its own there is no yardstick; notes:
        what else to say of a method at a step count (see `curves.falling`).
    """
    if not table:
        return ["No run has finished: there is nothing to recommend."]
    most = None if is_reference else max(teacher, default=None)
    lines, best = [], {}
    for steps in sorted({key[1] for key in table}):
        names = peers(table, steps)
        best[steps] = names[0]
        note = (notes or {}).get((names[0], steps), "")
        lines.append(_sentence(table, steps, names, teacher, most, needs or {}, note))
    values = {steps: table[name, steps].frechet for steps, name in best.items()}
    near = [n for n in best if most is not None and values[n] <= NEAR * teacher[most]]
    n = min(near) if near else min(best, key=lambda steps: values[steps])
    first, figure = f"Take {best[n]} at {counted(n, 'step')}: the", decimals(values[n])
    if most is None:
        return [f"{first} nearest to the teacher ({figure}).", *lines]
    against = f"({figure} against {decimals(teacher[most])}"
    if near:
        first += f" fewest steps within {NEAR - 1:.0%} of the teacher's {most} {against})."
    else:
        first += (
            f" nearest to the teacher's {counted(most, 'step')} {against}, "
            f"{values[n] / teacher[most]:.2f} times it); none comes within "
            f"{NEAR - 1:.0%} at this budget."
        )
    return [first, *lines]


def _sentence(
    table: Table,
    steps: int,
    names: Sequence[str],
    teacher: Mapping[int, float],
    most: int | None,
    needs: Mapping[str, str],
    note: str,
) -> str:
    best = table[names[0], steps]
    text = (
        f"{counted(steps, 'step')}: {names[0]} ({decimals(best.frechet)}, recall {best.recall:.2f}"
    )
    text += f"; the teacher {decimals(teacher[steps])} there" if steps in teacher else ""
    if most:
        text += f", {best.frechet / teacher[most]:.2f} times its {counted(most, 'step')}"
    text += ")"
    others = names[1:]
    if others:
        text += f"; not told apart from it by these runs: {', '.join(others)}"
        rank = {name: DATA_ORDER.index(needs[name]) for name in names if name in needs}
        least = min(rank, key=lambda name: rank[name], default=names[0])
        if rank.get(least, 9) < rank.get(names[0], -1):
            text += f", of which {least} needs {needs[least]} alone"
    if steps in teacher and best.frechet >= teacher[steps]:
        text += "; no student beats the teacher at this step count: raise the budget"
    elif note:
        text += f"; {names[0]} is {note}"
    return text + "."
