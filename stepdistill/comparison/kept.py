"""The students that stay: of each method and step count the best seed's exported pipeline."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stepdistill.storage.files import locked

KEPT = "students"


def kept_at(out: Path, label: str, steps: int) -> Path:
    """The folder of a method's pipeline for that many steps."""
    return out / KEPT / f"{label}_{steps}"


def keep(
    out: Path,
    known: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    exported: Callable[[int], Path],
) -> None:
    """Move a run's pipelines to where they stay, unless another seed's is better.

    Args: known: results of finished runs; rows: of this one; exported: steps -> its pipeline.
    """
    (out / KEPT).mkdir(exist_ok=True)
    with locked(out / KEPT):  # runs of other seeds end beside this one
        for row in rows:
            key = (row["label"], row["steps"])
            others = [
                _distance(other)
                for result in known
                for other in result["rows"]
                if (other["label"], other["steps"]) == key
            ]
            folder = kept_at(out, *key)
            if not folder.is_dir() or _distance(row) < min(others, default=math.inf):
                shutil.rmtree(folder, ignore_errors=True)
                shutil.move(exported(row["steps"]), folder)


def _distance(row: Mapping[str, Any]) -> float:
    return math.inf if row["frechet"] is None else float(row["frechet"]["mean"])
