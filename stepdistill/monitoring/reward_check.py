"""Reward hacking: a score that is kept out of training falls while one that is trained rises.

Looked at in stretches of log lines. The stretch in which the held-out score was highest is held
against each later one; a difference counts beyond three standard errors, taken from the lines of
both, so that noise of small batches is not told.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from stepdistill.config.rewards import RewardConfig, trained, watched
from stepdistill.config.watchdog import WatchdogConfig

_ERRORS = 3.0
_FEWEST = 5  # lines of a stretch: below that a standard error means little

Moments = tuple[float, float]  # a mean and the square of its standard error


class RewardCheck:
    """Judges log lines by their mean scores."""

    def __init__(
        self, config: WatchdogConfig, logging_steps: int, rewards: Sequence[RewardConfig]
    ) -> None:
        self._off = config.reward == "off"
        self._trained, self._watched = trained(rewards), watched(rewards)
        self._length = max(_FEWEST, math.ceil(config.sign_window / logging_steps))
        self._lines: list[dict[str, float]] = []
        # Held-out kind -> scores of its best stretch.
        self._best: dict[str, dict[str, Moments]] = {}

    def bad(self, values: Mapping[str, float]) -> str:
        """What is wrong now, or "". Call once a planned log line, with its means."""
        if self._off or not self._watched:
            return ""
        ends = {kind: f"/reward_{kind}" for kind in (*self._trained, *self._watched)}
        scores = (
            (kind, v) for kind, end in ends.items() for k, v in values.items() if k.endswith(end)
        )
        self._lines.append(dict(scores))
        if len(self._lines) < self._length:
            return ""
        now = {kind: moments for kind in ends if (moments := self._moments(kind)) is not None}
        self._lines = []
        said = []
        for kind in self._watched:
            if kind not in now:
                continue
            best = self._best.setdefault(kind, now)
            if now[kind][0] > best[kind][0]:
                self._best[kind] = now
            elif _differs(now[kind], best[kind]):
                risen = [
                    one
                    for one in self._trained
                    if one in now and one in best and _differs(best[one], now[one])
                ]
                said += [
                    f"{one} rose from {best[one][0]:.3g} to {now[one][0]:.3g} while {kind}, kept "
                    f"out of training, fell from {best[kind][0]:.3g} to {now[kind][0]:.3g}"
                    for one in risen
                ]
        return "; ".join(said)

    def _moments(self, kind: str) -> Moments | None:
        """Of the stretch's lines that have the score; None of fewer than _FEWEST."""
        scores = [line[kind] for line in self._lines if math.isfinite(line.get(kind, math.nan))]
        if len(scores) < _FEWEST:
            return None
        return statistics.fmean(scores), statistics.variance(scores) / len(scores)

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self._lines), "best": dict(self._best)}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up a saved state; none is of a run begun without this check."""
        if state is None:
            return
        self._lines = [dict(line) for line in state["lines"]]
        self._best = {
            kind: {name: (mean, error) for name, (mean, error) in best.items()}
            for kind, best in state["best"].items()
        }


def _differs(low: Moments, high: Moments) -> bool:
    """Whether the second mean is above the first beyond chance."""
    return high[0] - low[0] > _ERRORS * math.sqrt(low[1] + high[1])
