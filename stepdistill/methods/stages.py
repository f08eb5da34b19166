"""Stages of a run: where each begins, from the position alone, so that a resumed run agrees."""

from __future__ import annotations

import math
from itertools import pairwise


def check_stage_starts(starts: tuple[float, ...] | None, count: int) -> None:
    """Errors: ValueError where `starts` cannot begin the stages after the first of `count`."""
    if starts is None:
        return
    steps = all(start >= 1 and start == int(start) for start in starts)
    alike = steps or all(0 < start < 1 for start in starts)
    rises = all(a < b for a, b in pairwise(starts))
    if len(starts) != count - 1 or not alike or not rises:
        raise ValueError(
            f"stage_starts: expected {count - 1} rising numbers, all "
            f"fractions below 1 or all whole steps from 1 on, got {starts}."
        )


def stage_begins(count: int, starts: tuple[float, ...] | None, max_steps: int) -> tuple[int, ...]:
    """The first student step of each stage; stages of equal length where `starts` is None.

    Errors: ValueError for explicit starts at or beyond max_steps, whose stages never come.
    """
    starts = starts or tuple(i / count for i in range(1, count))
    if starts and starts[-1] >= 1 and starts[-1] >= max_steps:
        raise ValueError(
            f"stage_starts: expected steps below max_train_steps {max_steps}, got {starts}. "
            "The sampler is the last stage's. Train longer, or give fractions."
        )
    # A fraction's first whole step; the tolerance keeps 0.1 * 30 = 3 at step 3.
    return (0, *(math.ceil(s if s >= 1 else s * max_steps - 1e-9) for s in starts))


def stage_at(step: int, begins: tuple[int, ...]) -> int:
    """The stage that student step `step` belongs to."""
    return sum(begin <= step for begin in begins[1:])
