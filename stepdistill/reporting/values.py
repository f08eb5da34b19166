"""Numbers for people: a measured value with its spread, and short texts of numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Measured:
    """Mean and sample standard deviation, over noise seeds or training seeds; n: how many."""

    mean: float
    std: float = 0.0
    n: int = field(default=1, compare=False)

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), std, len(values))

    def text(self, form: str = ".2f", factor: float = 1) -> str:
        """Such as "2.10 ± 0.14"; the mean alone where nothing varies. Args: factor: of a unit."""
        mean = f"{self.mean * factor:{form}}"
        return f"{mean} ± {self.std * factor:{form}}" if self.std else mean


def counted(count: int, noun: str) -> str:
    """Such as "4,000 steps", "1 step", "2 processes"."""
    return f"{count:,} {_of(count, noun)}"


def any_of(counts: Sequence[int], noun: str, word: str = "or") -> str:
    """Such as "1 or 2 steps", "1 step"."""
    return f"{f' {word} '.join(map(str, counts))} {_of(max(counts, default=0), noun)}"


def _of(count: int, noun: str) -> str:
    return noun if count == 1 else noun + ("es" if noun.endswith("s") else "s")


def decimals(value: float) -> str:
    """Two decimals, or three digits below one."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def short(value: float) -> str:
    """A number in few characters: 1200 as 1.2k, 0.00012 as 1.2e-4."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        text = f"{value:.2g}" if size >= 1e6 else f"{value:.1e}"
        return text.replace("e-0", "e-").replace("e+0", "e")
    return (
        f"{value / 1000:.3g}k" if size >= 1e4 else f"{value:.4g}" if size >= 1 else f"{value:.3g}"
    )
