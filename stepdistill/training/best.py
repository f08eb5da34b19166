"""best.json: which checkpoint is the best by a named validation metric, and protected as such.

The pointer is written whole, after the checkpoint that it names is whole, and before the one that
it named until then may go: at no instant does it name nothing good.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stepdistill.models.safe_files import read_json
from stepdistill.training.whole import write_text

BEST_FILE = "best.json"


@dataclass(frozen=True)
class Best:
    """extra: saved only for being the best, so it goes when a better one is whole."""

    step: int
    metric: str
    mode: str
    value: float
    extra: bool = False

    @property
    def checkpoint(self) -> str:
        """The folder's name."""
        return f"checkpoint-{self.step}"

    def beaten_by(self, value: float) -> bool:
        """Whether that value of the same metric is better."""
        return value < self.value if self.mode == "min" else value > self.value


def write_best(output_dir: Path, best: Best) -> None:
    """Point to a checkpoint, which is whole."""
    told = {"checkpoint": best.checkpoint, **asdict(best)}
    write_text(output_dir / BEST_FILE, json.dumps(told, indent=2))


def read_best(output_dir: Path) -> Best | None:
    """The best so far, or None where no run has kept one (or its pointer is unreadable)."""
    try:
        told: dict[str, Any] = read_json(output_dir / BEST_FILE)
        return Best(
            int(told["step"]),
            str(told["metric"]),
            str(told["mode"]),
            float(told["value"]),
            bool(told["extra"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
