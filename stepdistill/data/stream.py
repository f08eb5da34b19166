"""Datasets in, the same endless stream of batches out, at any position and on any rank.

Sample k of the stream is a pure function of (seed, k), so a resumed run continues exactly where the
saved one stopped, with any number of loader workers. Rank r of W takes rows r B..(r+1) B of every
global batch of W B rows: N processes see what one process with the same global batch sees.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from stepdistill.core.context import stable_seed

# A cluster that wants its machine back sends these, often to a run's data workers too.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# What a dataset's item keys give a batch.
FIELDS = {"prompt": "cond", "label": "cond", "image": "x0", "x0": "x0", "noise": "noise"}


class PromptDataset(Dataset[dict[str, Any]]):
    """Prompts (or class labels) only. Errors: ValueError where there is none."""

    def __init__(self, prompts: Sequence[Any], where: str = "train_dataset") -> None:
        if not len(prompts):
            raise ValueError(f"{where}: expected at least one prompt, got none.")
        self.prompts = list(prompts)

    @classmethod
    def from_file(cls, path: str | Path) -> PromptDataset:
        """One prompt a line; empty lines are dropped."""
        file = Path(path)
        if not file.is_file():
            raise ValueError(f"prompts_file: expected a text file, got {str(path)!r}.")
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        return cls([line for line in lines if line], where=f"prompts_file {file.name}")

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"prompt": self.prompts[index]}


class EmptyRows(Dataset[dict[str, Any]]):
    """Rows without content, for methods that train unconditional models without data."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {}


def as_dataset(data: Any) -> Dataset[dict[str, Any]]:
    """A map-style dataset of dicts: sequences of strings or integers become prompts."""
    if isinstance(data, list | tuple):
        return PromptDataset(data)
    if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        raise TypeError(
            f"train_dataset: expected prompts or a map-style dataset of dicts, got {type(data)}."
        )
    if len(data) == 0:
        raise ValueError("train_dataset: expected at least one item, got an empty dataset.")
    return data  # type: ignore[no-any-return]


def provided_fields(dataset: Dataset[dict[str, Any]]) -> frozenset[str]:
    """Batch fields the dataset's items give, read off its first item."""
    item = dataset[0]
    text = {"prompts"} if "prompt" in item else set()
    return frozenset(FIELDS.get(key, key) for key in item) | text


class StreamSampler(Sampler[list[int]]):
    """Batches of indices of one rank, from global batch `start` on, epoch after epoch."""

    def __init__(
        self, size: int, batch: int, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self.rank, self.world_size, self.start = rank, world_size, start

    def _order(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(stable_seed("epoch", self.seed, epoch))
        return torch.randperm(self.size, generator=generator)

    def __iter__(self) -> Iterator[list[int]]:
        step, epoch, order = self.start, -1, torch.empty(0)
        while True:
            first = (step * self.world_size + self.rank) * self.batch
            rows = []
            for position in range(first, first + self.batch):
                if position // self.size != epoch:
                    epoch = position // self.size
                    order = self._order(epoch)
                rows.append(int(order[position % self.size]))
            yield rows
            step += 1


class _Indexed(Dataset[tuple[int, dict[str, Any]]]):
    def __init__(self, dataset: Dataset[dict[str, Any]]) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self.dataset[index]


def collate(items: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Lists for prompts and labels, stacked tensors for the rest, and "index" (B,)."""
    raw: dict[str, Any] = {"index": [index for index, _ in items]}
    for key in items[0][1]:
        values = [item[key] for _, item in items]
        if isinstance(values[0], torch.Tensor) and key != "label":
            raw[key] = torch.stack(values)
        else:
            raw[key] = values
    return raw


def _ignore_stop_signals(_worker: int) -> None:
    """The run ends its workers itself, once it has finished the step and saved."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stream(
    dataset: Dataset[dict[str, Any]],
    batch: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    start: int = 0,
    num_workers: int = 0,
) -> Iterator[dict[str, Any]]:
    """The endless stream of collated batches from global batch `start` on."""
    sampler = StreamSampler(len(dataset), batch, seed, rank, world_size, start)  # type: ignore[arg-type]
    loader = DataLoader(
        _Indexed(dataset),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=False,
        worker_init_fn=_ignore_stop_signals,
    )
    return iter(loader)
