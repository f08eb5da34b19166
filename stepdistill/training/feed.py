"""Feed: one data source of a run as an endless stream of raw batches, and the place in it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from stepdistill.cache.encoded import EncodedCache
from stepdistill.cache.precompute import prepare_cache
from stepdistill.config.run import TrainConfig
from stepdistill.core.context import stable_seed
from stepdistill.data.corrupt import CorruptLog
from stepdistill.data.source import Source
from stepdistill.data.stream import stream
from stepdistill.storage.files import one_line
from stepdistill.training.batches import REREAD

_TRIES = 3  # at a batch whose worker process was killed
_AHEAD_BYTES = 1 << 30  # of a step's batches, above which the rest is read when it is taken


class Feed:
    """A process's share of a dataset, batch by batch.

    Args: name: "" for the run's own data; another source has an order of its own, and its name
        before its logs.
    Attributes: seen: batches taken, the position that a checkpoint holds.
    """

    def __init__(self, dataset: Any, args: TrainConfig, name: str = "") -> None:
        self.dataset, self.name, self._args = dataset, name, args
        self._seed = stable_seed(name, args.seed) if name else args.seed
        self.corrupt = CorruptLog(args.max_corrupt_fraction)
        self.seen = 0
        self._again: Callable[[int], Iterator[dict[str, Any]]]
        self._batches: Iterator[dict[str, Any]] = iter(())
        self._ahead: deque[dict[str, Any]] = deque()

    def open(self, cache: EncodedCache | None, accelerator: Accelerator) -> None:
        """Begin (again) at `seen`; fills the cache first, where the run has one."""
        args = self._args
        dataset = prepare_cache(cache, self.dataset, args, accelerator)

        def again(seen: int) -> Iterator[dict[str, Any]]:
            return stream(
                dataset,
                args.train_batch_size,
                self._seed,
                accelerator.process_index,
                accelerator.num_processes,
                seen,
                args.dataloader_num_workers,
                self.corrupt,
            )

        self._again, self._batches = again, again(self.seen)
        self._ahead.clear()

    def close(self) -> None:
        """End the workers; `open` begins again at `seen`."""
        if isinstance(self._batches, Generator):
            self._batches.close()
        self._batches = iter(())
        self._ahead.clear()

    def read_ahead(self, count: int) -> None:
        """Have the next `count` batches in memory, so that taking them can't fail; fewer where
        they are large."""
        while len(self._ahead) < count and (
            not self._ahead or len(self._ahead) * _bytes_of(self._ahead[0]) < _AHEAD_BYTES
        ):
            self._ahead.append(self._read())

    def _read(self) -> dict[str, Any]:
        for left in reversed(range(_TRIES)):
            try:
                return next(self._batches)
            except RuntimeError as err:  # of torch, where a worker process was killed
                if "DataLoader worker" not in str(err) or not left:
                    raise
                warnings.warn(f"data: {one_line(err)} Its batch is read again.", stacklevel=2)
                self._batches = self._again(self.seen + len(self._ahead))
        raise AssertionError("a last try returns or raises")

    def __next__(self) -> dict[str, Any]:
        self.read_ahead(1)
        self.seen += 1
        raw = self._ahead.popleft()
        return {**raw, REREAD: self._reread} if isinstance(self.dataset, Source) else raw

    def _reread(self, row: int, raw: dict[str, Any], key: str) -> Tensor:
        """The image (3, H, W) of a row, left out as the cache had its latent, which was damaged.

        Args: key: of the item, "image" or the "rejected" one of a pair.
        """
        index = raw["index"][row]
        size = raw["size"][row] if "size" in raw else self.dataset.size_of(index)
        image: Tensor = self.dataset.item(index, size)[key]
        return image

    def logs(self, like: Tensor) -> dict[str, Tensor]:
        """See CorruptLog.logs."""
        prefix = f"{self.name}_" if self.name else ""
        return {prefix + name: value for name, value in self.corrupt.logs(like).items()}


def _bytes_of(raw: dict[str, Any]) -> int:
    return sum(value.nbytes for value in raw.values() if isinstance(value, Tensor))
