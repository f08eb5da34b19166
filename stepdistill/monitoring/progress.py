"""Whether a value that should fall goes the right way over a run.

A student may begin far from the teacher (one step from pure noise is a blur), so a value beyond its
threshold is bad where it is half as bad again as the best before (drifting away, not on its way),
or, where the share of the run that is done is told, has not come down from its first by that factor
when a quarter of the run is over: a student that drew one image a prompt from the start is no
better than it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_WORSE = 1.5
_TIME = 0.25  # share of a run in which a student has to leave where it began


class Progress:
    """Remembers the first and the best value of each name; lower is better."""

    def __init__(self) -> None:
        self._best: dict[str, float] = {}
        self._began: dict[str, float] = {}

    def bad(self, name: str, value: float, threshold: float, done: float = 0.0) -> bool:
        """Call once for each new value. Args: done: share of the run."""
        if not math.isfinite(value):
            return True
        before, began = self._best.get(name), self._began.setdefault(name, value)
        self._best[name] = value if before is None else min(before, value)
        drifts = before is not None and value > _WORSE * before
        return value > threshold and (drifts or (done >= _TIME and value > began / _WORSE))

    def state_dict(self) -> dict[str, Any]:
        return {"best": dict(self._best), "began": dict(self._began)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._best, self._began = dict(state["best"]), dict(state.get("began", {}))
