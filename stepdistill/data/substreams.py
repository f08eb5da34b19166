"""Which rows of which shards stand where in a stream that no one process reads whole.

The samples of a global batch of G are cut into `across` equal parts, and steps follow each other in
a cycle of `along`: a substream is one part of every along-th step. Ranks own whole parts and
workers every num_workers-th step, so each reads its own substreams alone; yet what a substream
holds depends on the set, G and the seed only, never on their numbers.

Every epoch shuffles the shards, lays their rows end to end and gives each substream a stretch of
them, as long as it has places in that epoch: every row once, in a place known without reading.
"""

# Shapes: S shards, k position in the stream (0-based, epoch after epoch), t place in a substream.

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch

from stepdistill.core.context import stable_seed

MOST_ACROSS = 8  # a single process reads all substreams at once: each is an open file and a buffer
ALONG = (4, 2, 1)

Piece = tuple[int, int, int]  # shard, first row, row past the last


def _order(size: int, *key: object) -> list[int]:
    generator = torch.Generator().manual_seed(stable_seed(*key))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


class Substreams:
    """The substreams of a set.

    Args: shards: rows of each shard. batch: samples of a global batch. seed: of the run.
    Attributes: number of substreams, at most one for each shard.
    """

    def __init__(self, shards: Sequence[int], batch: int, seed: int) -> None:
        self.shards, self.batch, self.seed = shards, batch, seed
        self.size = sum(shards)
        most = min(MOST_ACROSS, len(shards))
        self.across = max(d for d in range(1, most + 1) if batch % d == 0)
        self.along = max(d for d in ALONG if self.across * d <= len(shards) or d == 1)
        self.number = self.across * self.along
        self._width = batch // self.across  # places of a substream in one of its steps

    def at(self, position: int) -> int:
        """The substream of position k."""
        step, row = divmod(position, self.batch)
        return row // self._width + self.across * (step % self.along)

    def before(self, position: int, substream: int) -> int:
        """How many places of a substream come before position k."""
        along, part = divmod(substream, self.across)
        cycle, rest = divmod(position, self.batch * self.along)
        step, row = divmod(rest, self.batch)
        if step != along:
            begun = self._width * (step > along)
        else:
            begun = min(max(row - part * self._width, 0), self._width)
        return cycle * self._width + begun

    def position(self, place: int, substream: int) -> int:
        """The position of a substream's place t."""
        along, part = divmod(substream, self.across)
        cycle, row = divmod(place, self._width)
        return (cycle * self.along + along) * self.batch + part * self._width + row

    def span(self, epoch: int, substream: int) -> tuple[int, int]:
        """(first place, place past the last) of a substream in an epoch."""
        first = self.before(epoch * self.size, substream)
        return first, self.before((epoch + 1) * self.size, substream)

    def pieces(self, epoch: int, substream: int) -> list[Piece]:
        """The stretches of shards that a substream reads in an epoch, in order."""
        shards = _order(len(self.shards), "shards", self.seed, epoch)
        substreams = _order(self.number, "lanes", self.seed, epoch)  # its first name: runs go on
        begin = 0
        for other in substreams[: substreams.index(substream)]:
            first, end = self.span(epoch, other)
            begin += end - first
        first, end = self.span(epoch, substream)
        end += begin - first
        ends = list(accumulate(self.shards[s] for s in shards))
        pieces: list[Piece] = []
        index = bisect_right(ends, begin)
        while begin < end:
            start, until = ends[index] - self.shards[shards[index]], min(end, ends[index])
            if begin < until:
                pieces.append((shards[index], begin - start, until - start))
            begin, index = max(begin, until), index + 1
        return pieces
