"""Feed: one data source of a run as an endless stream of raw batches, and the place in it."""

from __future__ import annotations

from collections.abc import Iterator
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
from stepdistill.training.batches import REREAD


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
        self._batches: Iterator[dict[str, Any]] = iter(())

    def open(self, cache: EncodedCache | None, accelerator: Accelerator) -> None:
        """Begin (again) at `seen`; fills the cache first, where the run has one."""
        args = self._args
        self._batches = stream(
            prepare_cache(cache, self.dataset, args, accelerator),
            args.train_batch_size,
            self._seed,
            accelerator.process_index,
            accelerator.num_processes,
            self.seen,
            args.dataloader_num_workers,
            self.corrupt,
        )

    def __next__(self) -> dict[str, Any]:
        self.seen += 1
        raw = next(self._batches)
        return {**raw, REREAD: self._reread} if isinstance(self.dataset, Source) else raw

    def _reread(self, row: int, raw: dict[str, Any]) -> Tensor:
        """The image (3, H, W) of a row, left out as the cache had its latent, which was damaged."""
        index = raw["index"][row]
        size = raw["size"][row] if "size" in raw else self.dataset.size_of(index)
        image: Tensor = self.dataset.item(index, size)["image"]
        return image

    def logs(self, like: Tensor) -> dict[str, Tensor]:
        """See CorruptLog.logs."""
        prefix = f"{self.name}_" if self.name else ""
        return {prefix + name: value for name, value in self.corrupt.logs(like).items()}
