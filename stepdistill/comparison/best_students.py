"""The students that stay: of each method and step count the best seed's exported pipeline."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.storage.files import locked, set_aside
from stepdistill.storage.folders import foreign_files

STUDENTS = "students"


def best_student_folder(out: Path, label: str, steps: int) -> Path:
    """The folder of a method's pipeline for that many steps."""
    return out / STUDENTS / f"{label}_{steps}"


def keep_best(
    out: Path,
    known: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    exported: Callable[[int], Path],
) -> None:
    """Move a run's pipelines to where they stay, unless another seed's is better.

    Args: known: results of finished runs; rows: of this one; exported: steps -> its pipeline.
    """
    (out / STUDENTS).mkdir(exist_ok=True)
    with locked(out / STUDENTS):  # runs of other seeds end beside this one
        for row in rows:
            key = (row["label"], row["steps"])
            others = [
                _distance(other)
                for result in known
                for other in result["rows"]
                if (other["label"], other["steps"]) == key
            ]
            folder = best_student_folder(out, *key)
            if not folder.is_dir() or _distance(row) < min(others, default=math.inf):
                if folder.is_dir() and foreign_files(folder):
                    set_aside(folder)  # somebody has put files there
                shutil.rmtree(folder, ignore_errors=True)
                shutil.move(exported(row["steps"]), folder)


def _distance(row: Mapping[str, Any]) -> float:
    return math.inf if row["frechet"] is None else float(row["frechet"]["mean"])
