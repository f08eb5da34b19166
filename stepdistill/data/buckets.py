"""Aspect-ratio buckets: batches of one shape, each near the shape of its images.

Every image goes to the bucket of the nearest ratio of sides. A bucket's rows are an endless stream
of their own, epoch after epoch; the run's global batches are taken from these streams, bucket b as
often as it has rows: in its first e epochs floor(e n_b / G) times. What is left of a bucket comes
first in the next epoch, so nothing is lost, and any position is reached without those before it.
Source: the buckets are those of NovelAI's trainer and of SDXL, arXiv:2307.01952, App. I.
"""

# Shapes: H, W in px, n_b rows of bucket b, G samples of a global batch.

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from stepdistill.core.context import stable_seed
from stepdistill.data.decode import Size
from stepdistill.data.order import EpochOrder

MOST_RATIO = 2.0  # of the longer side to the shorter
_STEPS = 16  # of a side: sizes are multiples of a sixteenth of it, or of what the model needs


def bucket_sizes(size: Size, multiple: int) -> tuple[Size, ...]:
    """Sizes (H, W) in px of about the area of `size`, which is the first.

    Args: multiple: what sides are multiples of in any case.
    """
    step = multiple * max(1, math.ceil(math.sqrt(math.prod(size)) / _STEPS / multiple))
    area, sizes = math.prod(size), {size: None}
    for height in range(step, int(math.sqrt(area * MOST_RATIO)) + 1, step):
        width = max(1, round(area / height / step)) * step
        if max(height / width, width / height) <= MOST_RATIO:
            sizes |= {(height, width): None, (width, height): None}
    return tuple(sizes)


def nearest(sizes: Sequence[Size], shape: Size) -> int:
    """The number of the size whose ratio of sides is nearest to the shape's."""
    ratio = math.log(shape[0] / shape[1])
    return min(range(len(sizes)), key=lambda b: abs(math.log(sizes[b][0] / sizes[b][1]) - ratio))


class BucketOrder:
    """Row at any position of a stream whose global batches are of one bucket each.

    Args: buckets: bucket of each row (n,). batch: G. seed: of the run.
    """

    def __init__(self, buckets: NDArray[np.int16], batch: int, seed: int) -> None:
        self.batch, self.seed = batch, seed
        numbers = [int(b) for b in np.unique(buckets)]
        self._rows = [np.flatnonzero(buckets == b).astype(np.uint32) for b in numbers]
        self._streams = [
            EpochOrder(len(rows), stable_seed("bucket", seed, b))
            for b, rows in zip(numbers, self._rows, strict=True)
        ]
        self._epoch, self._plan = -1, np.empty((0, 2), dtype=np.int64)

    def _before(self, epoch: int) -> list[int]:
        """Batches of each bucket before that epoch."""
        return [epoch * len(rows) // self.batch for rows in self._rows]

    def __getitem__(self, position: int) -> int:
        step, place = divmod(position, self.batch)
        low, high = 0, 1
        while sum(self._before(high)) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sum(self._before(middle)) <= step else (low, middle)
        if low != self._epoch:
            self._load(low)
        bucket, number = self._plan[step - sum(self._before(low))].tolist()
        return int(self._rows[bucket][self._streams[bucket][number * self.batch + place]])

    def _load(self, epoch: int) -> None:
        """The batches of an epoch: (bucket, number in its stream), the buckets shuffled."""
        first, end = (np.asarray(self._before(e)) for e in (epoch, epoch + 1))
        buckets = np.repeat(np.arange(len(first)), end - first)
        generator = torch.Generator().manual_seed(stable_seed("buckets", self.seed, epoch))
        buckets = buckets[torch.randperm(len(buckets), generator=generator).numpy()]
        numbers = np.empty_like(buckets)
        for bucket, begin in enumerate(first):
            in_bucket = buckets == bucket
            numbers[in_bucket] = begin + np.arange(in_bucket.sum())
        self._epoch, self._plan = epoch, np.stack([buckets, numbers], axis=1)
