"""One progress bar for all that takes long: tqdm's, or a line now and then where nobody watches."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import tqdm.asyncio
import tqdm.auto
import tqdm.std

LINE_SECONDS = 30.0  # between lines where standard error is no terminal


class _Lines(tqdm.std.tqdm):  # type: ignore[type-arg]
    """A bar written as whole lines: a log file keeps each of them."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def write(text: str) -> None:
            if text.strip():
                file.write(text.strip() + "\n")
                file.flush()

        return write


def bar(iterable: Any = None, **options: Any) -> Any:
    """A tqdm bar of these options; where standard error is no terminal, a line each LINE_SECONDS
    and one at the end, and none at all of what is over before."""
    if sys.stderr.isatty() or tqdm.auto.tqdm is not tqdm.asyncio.tqdm_asyncio:
        return tqdm.auto.tqdm(iterable, **{**_unstated_size(), **options})
    options |= {"mininterval": LINE_SECONDS, "maxinterval": 2 * LINE_SECONDS, "miniters": 1}
    return _Lines(iterable, delay=LINE_SECONDS, **options)


def _unstated_size() -> dict[str, int]:
    """Of a terminal that states none (containers, `script`), where tqdm would write empty lines."""
    try:
        stated = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):  # no terminal of its own: a notebook, a file
        return {}
    if stated.columns and stated.lines:
        return {}
    columns, lines = shutil.get_terminal_size()
    return {"ncols": columns - 1, "nrows": lines}


def planned_steps(
    step: int, seconds: float, start: tuple[int, float], most: int, budget: float | None
) -> int:
    """Where a run ends by the budget that binds: `most` steps, or what `budget` seconds leave.

    Args: step, seconds: done so far. start: (step, seconds) that this process began at; its rate
        since then is taken to last.
    """
    done = step - start[0]
    if budget is None or done < 1:
        return most
    each = max(seconds - start[1], 1e-9) / done
    return min(most, step + max(0, math.ceil((budget - seconds) / each)))
