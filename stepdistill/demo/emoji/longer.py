"""What more time gives than the demo's minutes: a student that had an hour, measured once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepdistill.demo.metrics import Row
from stepdistill.demo.verdict import find_row
from stepdistill.reporting.values import counted
from stepdistill.storage.files import read_json

# A row of `stepdistill compare --budget 3600s`, see tests/benchmarks/RESULTS.md.
HOUR = Path(__file__).with_name("hour.json")


def an_hour(rows: Sequence[Row], method: str) -> list[tuple[str, str]]:
    """The report's fact about it, where it is of this method. Args: rows: the report's own, whose
    teacher at 50 steps it is held against."""
    had = read_json(HOUR, ["method", "steps", "seed", "seconds", "frechet", "recall"])
    fifty = find_row(rows, "teacher", 50)
    if fifty is None or method != had["method"]:
        return []
    ratio = had["frechet"] / fifty.frechet.mean
    line = (
        f"{counted(had['steps'], 'step')}: Fréchet {had['frechet']:.2f}, {ratio:.2f} × the "
        f"teacher's at 50 steps, recall {had['recall']:.2f} (measured once on one core, seed "
        f"{had['seed']}); yours: --seconds {had['seconds']:g}"
    )
    return [("an hour gives", line)]
