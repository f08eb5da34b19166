"""The budget that each student of a comparison gets; read without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What each student gets: seconds (see cost.clock) or updates."""

    seconds: float | None = None
    updates: int | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Of "240s" or "500steps". Errors: ValueError for anything else."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|steps?)", text.strip())
        if match is None or float(match[1]) <= 0:
            raise ValueError(f"budget: expected such as 240s or 500steps, got {text!r}.")
        if match[2] == "s":
            return cls(seconds=float(match[1]))
        return cls(updates=max(1, round(float(match[1]))))

    def __str__(self) -> str:
        return f"{self.updates}steps" if self.seconds is None else f"{self.seconds:g}s"
