"""The order of every epoch as a pure function of (seed, epoch), in memory that does not grow.

Shards are shuffled, then rows within windows of neighbouring shards, as a shuffle buffer does; but
a window is a permutation of numbers and not a state, so any position is reached at once. A set that
fits into one window is shuffled whole. Sets without shards are cut into blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from stepdistill.core.context import stable_seed

BLOCK = 4096  # rows of a block, where a set has no shards of its own
WINDOW = 1 << 18  # rows shuffled at a time: numbers alone, 2 MB


def _permutation(size: int, *key: object) -> NDArray[np.int64]:
    generator = torch.Generator().manual_seed(stable_seed(*key))
    order: NDArray[np.int64] = torch.randperm(size, generator=generator).numpy()
    return order


class EpochOrder:
    """Row at any position of any epoch; each epoch has every row once.

    Args:
        size: rows in all. seed: of the run.
        shards: rows of each shard, consecutive and size in sum; none means blocks of 4096.
        window: rows shuffled together, rounded up to whole shards.
    """

    def __init__(
        self, size: int, seed: int, shards: Sequence[int] | None = None, window: int = WINDOW
    ) -> None:
        self.size, self.seed, self.window = size, seed, window
        cuts = [BLOCK] * (size // BLOCK) + [size % BLOCK] * bool(size % BLOCK)
        self._sizes = np.asarray(cuts if shards is None else shards, dtype=np.int64)
        assert int(self._sizes.sum()) == size, "the shards are the set"
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._epoch, self._part = -1, (0, 0)  # positions of the epoch that `_rows` holds
        self._rows = np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> int:
        """The row at a position of the endless stream, epoch after epoch."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch or not self._part[0] <= place < self._part[1]:
            self._load(epoch, place)
        return int(self._rows[place - self._part[0]])

    def _load(self, epoch: int, place: int) -> None:
        """Make the window around that place of an epoch."""
        key = ("epoch", self.seed, epoch)
        if self.size <= self.window:
            self._part, self._rows = (0, self.size), _permutation(self.size, *key)
        else:
            order = _permutation(len(self._sizes), *key, "shards")
            begins = np.cumsum(self._sizes[order]) - self._sizes[order]
            windows = begins // self.window  # a shard belongs to the window that it begins in
            window = windows[np.searchsorted(begins, place, side="right") - 1]
            first = np.searchsorted(windows, window)
            last = np.searchsorted(windows, window, "right")
            end = int(begins[last]) if last < len(begins) else self.size
            rows = [self._starts[s] + np.arange(self._sizes[s]) for s in order[first:last]]
            joined = np.concatenate(rows)
            self._part = (int(begins[first]), end)
            self._rows = joined[_permutation(len(joined), *key, int(window))]
        self._epoch = epoch
