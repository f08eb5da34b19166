"""What can't be read is replaced, counted and named, and ends a run only where it is too much.

The replacement is drawn from (seed, position), so a resumed run replaces by the same samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stepdistill.core.context import stable_seed

TOLD = 5  # names in a message
GRACE = 1000  # draws before the fraction counts as measured
_TRIES = 100


class CorruptItemError(Exception):
    """One item of a dataset can't be read; its name is the message.

    A dataset of one's own may raise it: another item is then drawn in its place.
    """


def first_item(dataset: Any) -> dict[str, Any]:
    """The first item that can be read. Errors: ValueError where the first hundred can't."""
    bad: list[str] = []
    for index in range(min(len(dataset), _TRIES)):
        try:
            item: dict[str, Any] = dataset[index]
        except CorruptItemError as err:
            bad.append(str(err))
            continue
        return item
    raise ValueError(
        f"train_dataset: expected readable items, got none among the first {_TRIES} of "
        f"{type(dataset).__name__}: {bad[:TOLD]}."
    )


def good_item(
    dataset: Any, index: int, seed: int, position: int
) -> tuple[int, dict[str, Any], list[str]]:
    """(row, item, names of what it stands in for) at a position of the stream.

    Errors: ValueError where a hundred draws in a row can't be read.
    """
    bad: list[str] = []
    for attempt in range(_TRIES):
        try:
            return index, dataset[index], bad
        except CorruptItemError as err:
            bad.append(str(err))
            index = stable_seed("instead", seed, position, attempt) % len(dataset)
    raise ValueError(f"data: expected readable items, got {_TRIES} unreadable ones: {bad[:TOLD]}.")


class CorruptLog:
    """Counts what one process had to replace.

    Args: limit: largest fraction of the draws, from the first thousand on; counted from the start
        of the process.
    """

    def __init__(self, limit: float = 0.05) -> None:
        self.limit = limit
        self.draws = self.replaced = 0
        self.possible = False  # whether the data set is one that can have unreadable samples
        self._last = 0.0
        self.names: list[str] = []

    def add(self, draws: int, bad: Sequence[str]) -> None:
        """Note one batch. Errors: ValueError past the limit."""
        self.draws += draws
        self.replaced += len(bad)
        self._last = len(bad) / draws
        for name in bad:
            if len(self.names) < TOLD and name not in self.names:
                self.names.append(name)
                warnings.warn(f"data: {name} can't be read; replaced by another.", stacklevel=2)
        if bad and self.replaced > self.limit * max(self.draws, GRACE):
            raise ValueError(
                f"data: expected at most {self.limit:.3g} of the samples to be unreadable "
                f"(--max_corrupt_fraction), got {self}. Repair them, or allow more."
            )

    def logs(self, like: Tensor) -> dict[str, Tensor]:
        """{"unreadable": its fraction of the last batch}, on that tensor's device."""
        return {"unreadable": like.new_tensor(self._last)} if self.possible else {}

    def __str__(self) -> str:
        return f"{self.replaced} of {self.draws} ({', '.join(self.names)})"
