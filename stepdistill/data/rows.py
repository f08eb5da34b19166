"""Data that can only be read from a beginning: shards of rows, split exactly all the same.

A worker of a rank reads the substreams (see substreams.py) that its batches need, as undecoded
bytes, and decodes its own rows alone. The stream is what it would be in one process, and a resumed
run skips to its place. A set of one shard is one substream, which every worker of every rank reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from stepdistill.core.context import stable_seed
from stepdistill.data.corrupt import TOLD, CorruptItemError
from stepdistill.data.decode import Size
from stepdistill.data.degradation import Degradation
from stepdistill.data.degrade import drawn
from stepdistill.data.substreams import Substreams
from stepdistill.reporting.values import counted

_TRIES = 100
Item = tuple[int, dict[str, Any], list[str]]


class RowStream(ABC):
    """Rows that come in an order of their own, the same for the same (seed, epoch).

    Attributes: shards: rows of each shard that can be read by itself. size_px, known, degradation,
        px_beside, with_easier: as in `Source`.
    """

    shards: Sequence[int]
    size_px: int | Size | None = None
    known: Callable[[str], bool] | None = None
    degradation: Degradation | None = None
    px_beside, with_easier = 1, True

    def __len__(self) -> int:
        """Rows of an epoch."""
        return sum(self.shards)

    @abstractmethod
    def read(
        self, shard: int, begin: int, end: int | None, key: int, skip: int, substreams: int
    ) -> Iterator[Any]:
        """Undecoded rows begin..end (None: to the last) of a shard from the skip-th on.

        Args: key: decides on their order. substreams: how many are read at once, to share memory.
        """

    @abstractmethod
    def decode(self, row: Any) -> dict[str, Any]:
        """The item of a row. Errors: CorruptItemError where it can't be read."""

    def rows(self, seed: int = 0, epoch: int = 0) -> Iterator[Any]:
        """All undecoded rows of an epoch, from one process to itself."""
        stream = Substreams(self.shards, 1, seed)
        for substream in range(stream.number):
            yield from self.stretch(stream, epoch, substream)

    def stretch(
        self, substreams: Substreams, epoch: int, substream: int, skip: int = 0
    ) -> Iterator[Any]:
        """Undecoded rows of a substream in an epoch, from the skip-th on.

        Errors: ValueError where a shard has another number of rows than it said.
        """
        for shard, begin, end in substreams.pieces(epoch, substream):
            size = end - begin
            if skip >= size:
                skip -= size
                continue
            last = end == self.shards[shard]
            num_read, key = skip, stable_seed("rows", substreams.seed, epoch, shard, begin)
            for row in self.read(shard, begin, None if last else end, key, skip, substreams.number):
                num_read += 1
                yield row
            if num_read != size:
                raise ValueError(
                    f"data: expected {counted(end, 'row')} in shard {shard}, got "
                    f"{begin + num_read} in epoch {epoch}. The dataset changed or states "
                    "a wrong number: load it without streaming."
                )
            skip = 0

    def first(self) -> dict[str, Any]:
        """The first item that can be read."""
        bad: list[str] = []
        for row in self.rows():
            try:
                return self.decode(row)
            except CorruptItemError as err:
                bad = [*bad, str(err)][:TOLD]
        raise ValueError(f"train_dataset: expected readable items, got none: {bad}.")

    def share(
        self, batch: int, seed: int, rank: int, world_size: int, start: int
    ) -> IterableDataset[list[Item]]:
        """The batches of one rank from global batch `start` on."""
        return _Share(self, batch, seed, rank, world_size, start)


class _Substream:
    """One substream's rows by their positions, read ahead where one can't be read."""

    def __init__(
        self, source: RowStream, substreams: Substreams, substream: int, start: int
    ) -> None:
        self._source, self._substreams, self._substream = source, substreams, substream
        self._rows = self._endless(substreams.before(start, substream))
        self._ahead: deque[tuple[int, Any]] = deque()

    def _endless(self, place: int) -> Iterator[tuple[int, Any]]:
        """(position, row) from a place on, epoch after epoch."""
        substreams, substream = self._substreams, self._substream
        for epoch in count(substreams.position(place, substream) // substreams.size):
            first, end = substreams.span(epoch, substream)
            for row in self._source.stretch(substreams, epoch, substream, place - first):
                yield substreams.position(place, substream), row
                place += 1
            assert place == end

    def item(self, position: int) -> Item:
        """(position, item, names of what it stands in for): the substream's next readable one.

        Errors: ValueError where a hundred in a row can't be read.
        """
        while self._ahead and self._ahead[0][0] < position:
            self._ahead.popleft()
        bad: list[str] = []
        for row in self._from(position):
            try:
                item = self._source.decode(row)
                return position, drawn(self._source, item, self._substreams.seed, position), bad
            except CorruptItemError as err:
                bad.append(str(err))
                if len(bad) > _TRIES:
                    break
        raise ValueError(
            f"data: expected readable rows, got {_TRIES} unreadable ones in a row: {bad[:TOLD]}."
        )

    def _from(self, position: int) -> Iterator[Any]:
        """The substream's rows from a position on, which stay at hand."""
        for index in count():
            while index >= len(self._ahead):
                row = next(self._rows)
                if row[0] >= position:
                    self._ahead.append(row)
            yield self._ahead[index][1]


class _Share(IterableDataset[list[Item]]):
    """One rank's batches; a worker has every num_workers-th of them."""

    def __init__(
        self, source: RowStream, batch: int, seed: int, rank: int, world_size: int, start: int
    ) -> None:
        self.source, self.batch, self.seed = source, batch, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[Item]]:
        worker = get_worker_info()
        worker_id, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        substreams = Substreams(self.source.shards, self.batch * self.world_size, self.seed)
        open_substreams: dict[int, _Substream] = {}
        for step in count(self.start + worker_id, workers):
            begin = (step * self.world_size + self.rank) * self.batch
            batch = []
            for position in range(begin, begin + self.batch):
                substream = substreams.at(position)
                if substream not in open_substreams:
                    open_substreams[substream] = _Substream(
                        self.source, substreams, substream, position
                    )
                batch.append(open_substreams[substream].item(position))
            yield batch
