"""What the watchdog makes of a validation's metrics: which checks are bad, and since when.

See `progress` for when a value beyond its threshold is bad.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stepdistill.config.watchdog import WatchdogConfig

from .progress import Progress


class SampleChecks:
    """strikes: check -> bad validations in a row."""

    def __init__(self, config: WatchdogConfig) -> None:
        self._config = config
        self._progress = Progress()
        self._first: dict[str, float] = {}
        self.strikes: dict[str, int] = {}

    def bad(self, step: int, metrics: Mapping[str, float], done: float = 0.0) -> dict[str, str]:
        """check -> what is wrong, for the checks that are bad now. Call once a validation.

        Args: done: share of the run.
        """
        config, alarms = self._config, {}
        if config.drift != "off":
            lines = [*self._drift(metrics)]
            if lines:
                alarms["drift"] = "x0 drifts from the teacher's: " + ", ".join(lines)
        if config.diversity != "off":
            ratio = self._diversity_ratio(metrics)
            if ratio is not None and self._progress.bad(
                "diversity", 1.0 / max(ratio, 1e-9), 1.0 / config.min_diversity, done
            ):
                alarms["diversity"] = f"diversity is {ratio:.3g} of what it should be"
        moves = metrics.get("movement_ratio")
        if config.movement != "off" and moves is not None:
            least = 1.0 / config.min_movement
            if self._progress.bad("movement", 1.0 / max(moves, 1e-9), least, done):
                alarms["movement"] = f"its videos move {moves:.3g} times as much as the teacher's"
        if config.fake_lag != "off" and step > 0:  # before any update the fake is the teacher
            lag = metrics.get("fake_lag", 0.0)
            sure = abs(lag) - 2.0 * metrics.get("fake_lag_error", 0.0)
            if sure > config.max_fake_lag:
                alarms["fake_lag"] = f"the fake lags the student by {lag:.3g} of its gradient"
        for check in ("drift", "diversity", "movement", "fake_lag"):
            self.strikes[check] = self.strikes.get(check, 0) + 1 if check in alarms else 0
        return alarms

    def guidance(self, metrics: Mapping[str, float]) -> str | None:
        """What is wrong with the teacher's own guided samples, against its unguided ones.

        A student that matches them is where it was sent; no later value can be better.
        """
        measures = self._measures(metrics, "guided_", "guided_")
        signs = [f"{name} {value:.3g}" for name, value, most in measures if value > most]
        if self._config.drift == "off" or not signs:
            return None
        return f"its guidance drives its samples off: {', '.join(signs)}"

    def _drift(self, metrics: Mapping[str, float]) -> list[str]:
        return [
            f"{name} {value:.3g}"
            for name, value, most in self._measures(metrics, "x0_", "")
            if self._progress.bad(name, value, most)
        ]

    def _measures(
        self, metrics: Mapping[str, float], x0: str, images: str
    ) -> Iterator[tuple[str, float, float]]:
        """(name, value, threshold) of the drifts there are; x0, images: prefixes of their keys."""
        config = self._config
        if (shift := metrics.get(f"{x0}mean_drift")) is not None:
            yield "mean shift", shift, config.max_mean_drift
        if (ratio := metrics.get(f"{x0}std_ratio")) is not None:
            yield "std ratio", ratio, config.max_std_ratio
            yield "inverse std ratio", 1.0 / max(ratio, 1e-9), config.max_std_ratio
        if (excess := metrics.get(f"{images}saturation_excess")) is not None:
            yield "excess saturation", excess, config.max_saturation

    def _diversity_ratio(self, metrics: Mapping[str, float]) -> float | None:
        if "diversity_ratio" in metrics:
            return metrics["diversity_ratio"]
        if "diversity" not in metrics:
            return None
        first = self._first.setdefault("diversity", metrics["diversity"])
        return metrics["diversity"] / first if first > 0.0 else None

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._progress.state_dict(),
            "first": dict(self._first),
            "strikes": dict(self.strikes),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._progress.load_state_dict(state)
        self._first = dict(state["first"])
        self.strikes = dict(state["strikes"])
