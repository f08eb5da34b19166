"""Data that can only be read from its beginning: streams of rows, split exactly all the same.

Every worker of every rank reads all rows of an epoch as undecoded bytes and decodes its own alone,
so the stream is what it would be in one process, and a resumed run skips to its place. That is the
price of exactness where there is no random access: rows are read once per worker and rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from stepdistill.data.corrupt import TOLD, CorruptItemError

_TRIES = 100
Item = tuple[int, dict[str, Any], list[str]]


class RowStream(ABC):
    """Rows that come in an order of their own, the same for the same (seed, epoch).

    Attributes: known: as in `Source`.
    """

    known: Callable[[str], bool] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Rows of an epoch."""

    @abstractmethod
    def rows(self, seed: int, epoch: int, start: int) -> Iterator[Any]:
        """Undecoded rows of an epoch from row `start` on."""

    @abstractmethod
    def decode(self, row: Any) -> dict[str, Any]:
        """The item of a row. Errors: CorruptItemError where it can't be read."""

    def first(self) -> dict[str, Any]:
        """The first item that can be read."""
        for row in self.rows(0, 0, 0):
            try:
                return self.decode(row)
            except CorruptItemError:
                continue
        raise ValueError("train_dataset: expected readable items, got none.")

    def share(
        self, batch: int, seed: int, rank: int, world_size: int, start: int
    ) -> IterableDataset[list[Item]]:
        """The batches of one rank from global batch `start` on."""
        return _Share(self, batch, seed, rank, world_size, start)

    def endless(self, seed: int, position: int) -> Iterator[tuple[int, Any]]:
        """(position, row) from a position on, epoch after epoch.

        Errors: ValueError where an epoch has another number of rows than it said.
        """
        epoch, place = divmod(position, len(self))
        while True:
            found = place
            for row in self.rows(seed, epoch, place):
                yield epoch * len(self) + found, row
                found += 1
            if found != len(self):
                raise ValueError(
                    f"data: expected {len(self)} rows in each epoch, got {found} in epoch {epoch}. "
                    "The dataset changed or states a wrong number: load it without streaming."
                )
            epoch, place = epoch + 1, 0


class _Share(IterableDataset[list[Item]]):
    """One rank's batches; a worker has every num_workers-th of them.

    A row that can't be read is replaced by the next that can, whosever that is.
    """

    def __init__(
        self, source: RowStream, batch: int, seed: int, rank: int, world_size: int, start: int
    ) -> None:
        self.source, self.batch, self.seed = source, batch, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[Item]]:
        worker = get_worker_info()
        own, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        begin = ((self.start + own) * self.world_size + self.rank) * self.batch
        ready: list[Item] = []
        waiting: list[tuple[int, list[str]]] = []  # places without an item, what they stand in for
        for position, row in self.source.endless(self.seed, begin):
            share, _ = divmod(position, self.batch)
            step, rank = divmod(share, self.world_size)
            if rank == self.rank and (step - self.start) % workers == own:
                waiting.append((position, []))
            if not waiting:
                continue
            try:
                item = self.source.decode(row)
            except CorruptItemError as err:
                for _, bad in waiting:
                    bad.append(str(err))
                if len(waiting[0][1]) > _TRIES:
                    raise ValueError(
                        f"data: expected readable rows, got {_TRIES} unreadable ones in a row: "
                        f"{waiting[0][1][:TOLD]}."
                    ) from err
                continue
            ready += [(place, item, bad) for place, bad in waiting]
            waiting = []
            while len(ready) >= self.batch:
                yield ready[: self.batch]
                ready = ready[self.batch :]
