"""Datasets in, the same endless stream of batches out, at any position and on any rank.

Sample k of the stream is a pure function of (seed, k), so a resumed run continues exactly where the
saved one stopped, with any number of loader workers. Rank r of W takes rows r B..(r+1) B of every
global batch of W B rows: N processes see what one process with the same global batch sees. Whole
batches go to workers in turn, so nothing depends on their number either.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from stepdistill.core.stopping import STOP_SIGNALS
from stepdistill.data.buckets import BucketOrder
from stepdistill.data.captions import caption_of
from stepdistill.data.corrupt import CorruptLog, first_item, good_item
from stepdistill.data.degrade import drawn
from stepdistill.data.fingerprint import list_digest
from stepdistill.data.lines import LineFile
from stepdistill.data.order import EpochOrder
from stepdistill.data.rows import RowStream
from stepdistill.data.source import Source

# What a dataset's item keys give a batch.
FIELDS = {"prompt": "cond", "label": "cond", "image": "x0", "x0": "x0", "noise": "noise"}


class PromptDataset(Dataset[dict[str, Any]]):
    """Prompts (or class labels) only; a list of captions in a prompt's place is drawn from.

    Errors: ValueError where there is none, or one is neither text nor number nor such a list.
    """

    def __init__(self, prompts: Sequence[Any], where: str = "train_dataset") -> None:
        if not len(prompts):
            raise ValueError(f"{where}: expected at least one prompt, got none.")
        self.prompts = prompts if isinstance(prompts, LineFile) else list(prompts)
        for number, prompt in enumerate(prompts if self.prompts is not prompts else ()):
            if isinstance(prompt, Integral) or prompt == "":  # labels; the empty prompt
                continue
            try:
                caption_of(prompt)
            except ValueError as err:
                raise ValueError(f"{where}: {err}, prompt {number}. Correct it.") from err

    @classmethod
    def from_file(cls, path: str | Path) -> PromptDataset:
        """One prompt a line; empty lines are dropped. The file is read as it is needed."""
        return cls(LineFile(path), where=f"prompts_file {Path(path).name}")

    def __len__(self) -> int:
        return len(self.prompts)

    def fingerprint(self) -> str:
        """sha256 of the prompts."""
        lines = self.prompts
        return lines.sha256 if isinstance(lines, LineFile) else list_digest(lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.prompts[index]}


class EmptyRows(Dataset[dict[str, Any]]):
    """Rows without content, for methods that train unconditional models without data."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {}


def as_dataset(data: Any, where: str = "train_dataset") -> Any:
    """A map-style dataset of dicts, or a RowStream; lists of strings or integers are prompts."""
    if isinstance(data, list | tuple):
        return PromptDataset(data, where)
    if isinstance(data, RowStream):
        return data
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(
            f"{where}: expected prompts or a map-style dataset of dicts, got {type(data)}."
        )
    if len(data) == 0:
        raise ValueError(f"{where}: expected at least one item, got an empty dataset.")
    return data


def sample_item(dataset: Any) -> dict[str, Any]:
    """One readable item of a dataset, without its file's hash, and of captions the first."""
    item = dataset.first() if isinstance(dataset, RowStream) else first_item(dataset)
    item = drawn(dataset, item, 0, 0)
    private = ("content", "rejected_content", "size")
    return {key: value for key, value in item.items() if key not in private}


def provided_fields(dataset: Any) -> frozenset[str]:
    """Batch fields the dataset's items give, read off its first item."""
    item = sample_item(dataset)
    text = {"prompts"} if "prompt" in item else set()
    return frozenset(FIELDS.get(key, key) for key in item) | text


class StreamSampler(Sampler[list[int]]):
    """Batches of rows of one rank, from global batch `start` on, epoch after epoch.

    Args: order: of the rows; none means the one of a set without shards.
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        order: EpochOrder | BucketOrder | None = None,
    ) -> None:
        self.batch, self.rank, self.world_size, self.start = batch, rank, world_size, start
        self.order = EpochOrder(size, seed) if order is None else order

    def placed(self) -> Iterator[list[tuple[int, int]]]:
        """Batches of (position in the stream, row)."""
        step = self.start
        while True:
            first = (step * self.world_size + self.rank) * self.batch
            yield [(place, self.order[place]) for place in range(first, first + self.batch)]
            step += 1

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.placed():
            yield [row for _, row in batch]


class _Placed(Sampler[list[tuple[int, int]]]):
    def __init__(self, sampler: StreamSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.sampler.placed()


Row = tuple[int, dict[str, Any], list[str]]  # its number, the item, what it stands in for


class _Indexed(Dataset[Row]):
    def __init__(self, dataset: Dataset[dict[str, Any]], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, placed: tuple[int, int]) -> Row:  # type: ignore[override]
        position, row = placed
        data: Any = self.dataset
        if isinstance(data, Source) and data.has_buckets:
            data = _OfOneSize(data, data.size_of(row))  # also what may replace the row
        row, item, bad = good_item(data, row, self.seed, position)
        return row, drawn(self.dataset, item, self.seed, position), bad


class _OfOneSize:
    def __init__(self, source: Source, size: Any) -> None:
        self.source, self.size = source, size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.source.item(index, self.size)


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """Lists for prompts and labels, stacked tensors for the rest, "index" (B,) and "corrupt".

    Images that need not be read, as their latents are known, are None in a list of images.
    """
    raw: dict[str, Any] = {"index": [index for index, _, _ in rows]}
    raw["corrupt"] = [name for _, _, bad in rows for name in bad]
    for key in dict.fromkeys(key for _, item, _ in rows for key in item):
        values = [item.get(key) for _, item, _ in rows]
        if all(isinstance(value, torch.Tensor) for value in values) and key != "label":
            shapes = {tuple(value.shape) for value in values}  # type: ignore[union-attr]
            if len(shapes) > 1:
                raise ValueError(
                    f"train_dataset: expected {key} of one shape in a batch, got {sorted(shapes)}. "
                    "Give them all one size."
                )
            raw[key] = torch.stack(values)  # type: ignore[arg-type]
        else:
            raw[key] = values
    return raw


def _ignore_stop_signals(_worker: int) -> None:
    """The run ends its workers itself, once it has finished the step and saved."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def stream(
    dataset: Any,
    batch: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    num_workers: int = 0,
    corrupt: CorruptLog | None = None,
) -> Iterator[dict[str, Any]]:
    """The endless stream of collated batches from global batch `start` on.

    Args: dataset: map-style, or a RowStream. corrupt: where replaced samples are counted.
    """
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "persistent_workers": False,
        "worker_init_fn": _ignore_stop_signals,
    }
    loader: DataLoader[Any]
    if isinstance(dataset, RowStream):
        share = dataset.share(batch, seed, rank, world_size, start)
        loader = DataLoader(share, batch_size=None, collate_fn=collate, **options)
    else:
        order: EpochOrder | BucketOrder | None = None
        if isinstance(dataset, Source):
            order = dataset.bucket_order(seed, batch * world_size) or dataset.order(seed)
        sampler = StreamSampler(len(dataset), batch, seed, rank, world_size, start, order)
        placed = _Placed(sampler)
        data = _Indexed(dataset, seed)
        loader = DataLoader(data, batch_sampler=placed, collate_fn=collate, **options)
    corrupt = CorruptLog() if corrupt is None else corrupt
    corrupt.possible = isinstance(dataset, Source | RowStream)
    return _counted(_workers_die_quietly(loader), corrupt)


def _workers_die_quietly(loader: DataLoader[Any]) -> Iterator[dict[str, Any]]:
    """The loader's iterator. A worker that is killed is noticed where its batch is asked for: torch
    would have its signal raise an error wherever the run is, in the midst of an update too."""
    handler = signal.getsignal(signal.SIGCHLD)
    batches = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
    return batches


def _counted(batches: Iterator[dict[str, Any]], corrupt: CorruptLog) -> Iterator[dict[str, Any]]:
    try:
        for raw in batches:
            corrupt.add(len(raw["index"]), raw.pop("corrupt"))
            yield raw
    finally:
        # Not left to garbage collection: it may close the workers' queues before their iterator,
        # which then waits for workers that nothing tells to end, and that ignore the last resort.
        getattr(batches, "_shutdown_workers", lambda: None)()
