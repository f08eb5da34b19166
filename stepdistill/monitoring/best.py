"""best.json: which checkpoint is the best by a named validation metric, and protected as such.

The pointer is written whole, after the checkpoint that it names is whole, and before the one that
it named until then may go: at no instant does it name nothing good.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepdistill.config.metrics import BEST_METRICS, METRICS
from stepdistill.config.run import TrainConfig
from stepdistill.storage.files import read_json, write_text

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """extra: saved only for being the best, so it goes when a better one is whole."""

    step: int
    metric: str
    mode: str  # the metric's own; earlier versions let the user choose another
    value: float
    extra: bool = False

    @property
    def checkpoint(self) -> str:
        """The folder's name."""
        return f"checkpoint-{self.step}"

    def beaten_by(self, value: float) -> bool:
        """Whether that value of the same metric is better."""
        return value < self.value if self.mode == "min" else value > self.value


def check_measured(args: TrainConfig, metrics: Mapping[str, float]) -> None:
    """Errors: ValueError where best_metric is none of a validation's metrics."""
    name = args.best_metric
    if name is not None and name not in metrics:
        measured = [other for other in BEST_METRICS if other in metrics]
        raise ValueError(
            f"best_metric: expected one of {', '.join(measured) or 'none'}, which this run's "
            f"validation measures, got {name}. Name one of them, or leave best_metric out."
        )


def new_best(
    before: Best | None, args: TrainConfig, step: int, metrics: Mapping[str, float]
) -> Best | None:
    """The best, where these metrics of `step` (updates; 0 is no candidate) beat the one before.

    One of another metric, or of an earlier version's mode, is beaten by any.
    """
    name = args.best_metric
    value = math.nan if name is None else metrics.get(name, math.nan)
    if name is None or step == 0 or not math.isfinite(value):
        return None
    mode = METRICS[name].mode
    assert mode is not None, "refused by TrainConfig"
    alike = before is not None and (before.metric, before.mode) == (name, mode)
    if before is not None and alike and not before.beaten_by(value):
        return None
    every = args.checkpointing_steps
    due = (every and step % every == 0) or step >= args.max_train_steps
    return Best(step, name, mode, value, extra=not due)


def write_best(output_dir: Path, best: Best) -> None:
    """Point to a checkpoint, which is whole."""
    record = {"checkpoint": best.checkpoint, **asdict(best)}
    write_text(output_dir / BEST_FILE, json.dumps(record, indent=2))


def read_best(output_dir: Path) -> Best | None:
    """The best so far, or None where no run has kept one (or its pointer is unreadable)."""
    try:
        record: dict[str, Any] = read_json(output_dir / BEST_FILE)
        return Best(
            int(record["step"]),
            str(record["metric"]),
            str(record["mode"]),
            float(record["value"]),
            bool(record["extra"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
