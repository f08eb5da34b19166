"""Fill the cache of encoded prompts and latents: forecast, check the disk, encode what is missing.

Prompts and images are encoded one by one, so their bits depend neither on the order nor on where
an interrupted call goes on. Ranks share the keys; what they read they all read.
"""

# Shapes: C channels, *S spatial, H, W in px.

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from copy import copy
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor

from stepdistill.cache.encoded import EncodedCache, image_key
from stepdistill.cache.tensors import CacheWriter, content_key, missing_keys, row_bytes
from stepdistill.config.run import RunConfig, TrainConfig
from stepdistill.core.stopping import Stopped, stop_if_orphaned
from stepdistill.data.captions import all_captions
from stepdistill.data.corrupt import CorruptItemError, CorruptLog
from stepdistill.data.fingerprint import data_facts
from stepdistill.data.rows import RowStream
from stepdistill.data.source import Source, fitted, pictures, sizes_of
from stepdistill.data.stream import PromptDataset, sample_item
from stepdistill.families.family import Family
from stepdistill.families.registry import load_encoders, teacher_facts
from stepdistill.families.size import size_fits
from stepdistill.reporting.bars import bar
from stepdistill.storage.ranks import agreed, owned_by_first, process_state, refusing_together

_PROBES = 512  # images looked at to say how many are missing


def encode_prompt(family: Family, prompt: Any) -> dict[str, Tensor]:
    """One prompt's tensors without the batch's dimension; alone, so that its bits are its own."""
    return {name: value[0] for name, value in family.encode_text([prompt]).tensors.items()}


class _Task:
    """One kind of thing to encode: (key, value) of every sample, and what encodes a value."""

    def __init__(self, cache: EncodedCache, dataset: Any, corrupt: CorruptLog) -> None:
        self.family, self.dataset, self.corrupt = cache.family, dataset, corrupt

    def _read(self, get: Callable[[Any], dict[str, Any]], rows: Iterable[Any]) -> Iterator[Any]:
        """What can be read of the rows, in order."""
        for row in rows:
            try:
                item, bad = get(row), []
            except CorruptItemError as err:
                item, bad = {}, [str(err)]
            self.corrupt.add(1, bad)
            if not bad:
                yield item

    def _items(self, data: Any, only: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        if isinstance(data, RowStream):
            rows = islice(data.rows(), None if only is None else len(only))
            return self._read(data.decode, rows)
        return self._read(data.__getitem__, range(len(data)) if only is None else only)


class Prompts(_Task):
    """The dataset's prompts; their images stay unread where the source can do without."""

    name = "prompts"

    def __init__(self, cache: EncodedCache, dataset: Any, corrupt: CorruptLog) -> None:
        super().__init__(cache, dataset, corrupt)
        assert cache.prompts is not None
        self.store = cache.prompts

    def read(self, rank: int, world_size: int) -> Iterator[tuple[bytes, Any]]:
        data = self.dataset
        rule = getattr(data, "degradation", None)
        if rule is not None and rule.prompt is not None:
            texts: Iterable[Any] = (rule.prompt,)
        elif isinstance(data, PromptDataset):
            texts = data.prompts
        elif isinstance(data, Source):
            texts = (item["prompt"] for item in self._read(data.condition, range(len(data))))
        else:
            texts = (item["prompt"] for item in self._items(data))
        return ((content_key(text), text) for captions in texts for text in all_captions(captions))

    def encode(self, text: Any) -> dict[str, Tensor]:
        return encode_prompt(self.family, text)

    def missing(self) -> int:
        return missing_keys(self.store, (key for key, _ in self.read(0, 1)))


class Images(_Task):
    """The dataset's images, decoded only where their latents are this rank's to make."""

    name = "images"

    def __init__(
        self, cache: EncodedCache, dataset: Any, corrupt: CorruptLog, device: torch.device
    ) -> None:
        super().__init__(cache, dataset, corrupt)
        assert cache.latents is not None
        self.store, self.device = cache.latents, device

    def read(self, rank: int, world_size: int) -> Iterator[tuple[bytes, Any]]:
        def needless(content: str) -> bool:
            key = content_key(content)
            return owner(key, world_size) != rank or key in self.store

        for item in self._items(_knowing(self.dataset, needless)):
            for picture in pictures(item):
                yield image_key(picture), picture.get("image")

    def encode(self, image: Tensor) -> dict[str, Tensor]:
        return {"x0": self.family.latents(image.unsqueeze(0).to(self.device))[0].float()}

    def missing(self) -> int:
        """Told from some hundred images spread over the set: a forecast, as all are to be read."""
        count = len(self.dataset)
        probes = sorted({i * count // _PROBES for i in range(_PROBES)})
        undecoded = _knowing(self.dataset, lambda _: True)
        probed = [pictures(item) for item in self._items(undecoded, probes)]
        missing = sum(image_key(one) not in self.store for item in probed for one in item)
        return round(count * missing / max(len(probed), 1))


def owner(key: bytes, world_size: int) -> int:
    """The rank that encodes a key: two ranks never write the same one."""
    return int.from_bytes(key[-4:], "big") % world_size


def _knowing(dataset: Any, known: Callable[[str], bool]) -> Any:
    """A dataset that leaves out images whose content is known, where it is one that can."""
    if isinstance(dataset, Source | RowStream):
        dataset = copy(dataset)
        dataset.known = known
    return dataset


def gib(count: float) -> str:
    """Bytes as text."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def fill(
    cache: EncodedCache,
    dataset: Any,
    device: torch.device,
    shard_bytes: int,
    rank: int = 0,
    world_size: int = 1,
    say: Callable[[str], object] = print,
    progress: bool = False,
) -> None:
    """Encode what the cache lacks of a dataset's prompts and images; this rank's share of the keys.

    Every rank calls it; afterwards wait for all and `reopen`. An interrupted call goes on.
    Errors: ValueError where the forecast needs more than the disk has free, before it is filled.
    """
    corrupt = CorruptLog(limit=1.0)  # training judges how much is too much
    item = sample_item(dataset)
    tasks: list[Prompts | Images] = []
    if cache.prompts is not None and "prompt" in item:
        tasks.append(Prompts(cache, dataset, corrupt))
    if cache.latents is not None and "image" in item:
        tasks.append(Images(cache, dataset, corrupt, device))
    with torch.no_grad():
        _check_room(cache.folder, tasks, item, say)
        for task in tasks:
            writer = CacheWriter(task.store, shard_bytes)
            items = task.read(rank, world_size)
            try:
                total = len(dataset) if isinstance(dataset, Sized) else None
                name = f"encode {task.name}"
                for key, value in bar(items, desc=name, total=total, disable=not progress):
                    stop_if_orphaned()
                    if owner(key, world_size) == rank and key not in writer:
                        encoded = task.encode(value)
                        _check_finite(encoded, task.name, value)
                        writer.add(key, encoded)
            except Stopped:
                writer.flush()
                raise
            writer.flush()


def _check_finite(encoded: dict[str, Tensor], kind: str, value: Any) -> None:
    """Errors: ValueError for NaN or inf, which the cache would keep for ever."""
    if any(not bool(x.isfinite().all()) for x in encoded.values() if x.is_floating_point()):
        which = repr(value) if isinstance(value, str) else "one of them"
        raise ValueError(
            f"cache: expected finite encodings of {kind}, got NaN or inf for {which}. The encoder "
            "overflowed: use --mixed_precision bf16 or no."
        )


def _check_room(
    folder: Path, tasks: Sequence[Prompts | Images], item: dict[str, Any], say: Callable[[str], Any]
) -> None:
    """Say how many bytes are to come. Errors: ValueError where the disk has fewer free."""
    needed, free = 0, shutil.disk_usage(folder).free
    for task in tasks:
        missing = task.missing()
        size = 0
        if missing:
            one = task.encode(item["prompt" if isinstance(task, Prompts) else "image"])
            size = row_bytes(one)
        needed += missing * size
        say(
            f"cache: {len(task.store):,} {task.name} there, {missing:,} to encode x {gib(size)} = "
            f"{gib(missing * size)}"
        )
    say(f"cache: {gib(needed)} needed, {gib(free)} free in {folder}")
    if needed > free:
        raise ValueError(
            f"cache_dir: expected {gib(needed)} free in {folder}, got {gib(free)}. Free some "
            "space, choose another --cache_dir, or train without one."
        )


def prepare_cache(
    cache: EncodedCache | None, dataset: Any, args: TrainConfig, state: PartialState | Accelerator
) -> Any:
    """Fill a run's cache on all ranks; returns the dataset without the images that it has.

    A set that was gone through before is not read again, where the cache has not lost a row since.
    Where another run fills the same cache, its end is waited for.
    """
    if cache is None:
        return dataset
    facts = {**data_facts(dataset), "resolution": args.resolution, "sizes": sizes_of(dataset)}
    seen = cache.seen(facts)
    state.wait_for_everyone()  # all have looked before one writes
    say = print if state.is_main_process else (lambda _: None)
    if seen:
        say(f"cache: {cache.folder} has these data already")
    else:
        rank, world_size = state.process_index, state.num_processes
        progress = state.is_main_process and not args.disable_progress_bar
        shard_bytes = args.cache_shard_mb << 20
        with owned_by_first(cache.folder, "cache_dir", wait=say):
            cache.reopen()
            fill(cache, dataset, state.device, shard_bytes, rank, world_size, say, progress)
            state.wait_for_everyone()
            cache.reopen()
            if state.is_main_process:
                cache.note(facts)
    if cache.latents is None or getattr(dataset, "degradation", None) is not None:
        return dataset  # whose images are read, to be made smaller
    return _knowing(dataset, cache.latents.knows)


@refusing_together()
def cache_run(run: RunConfig, *datasets: Any) -> EncodedCache:
    """Fill the cache of a run's own encoders and data, as its trainer would; nothing is trained.

    The denoiser is not loaded: text encoders and the autoencoder are all that must fit.
    Run under `accelerate launch` to share the work.
    Errors: ValueError where cache_dir is missing, the model has nothing to cache, or see `fill`.
    """
    if run.cache_dir is None:
        raise ValueError("cache: expected --cache_dir, a folder to fill, got none.")
    agreed(lambda: teacher_facts(run.source))
    state = process_state()
    family = load_encoders(run.source, state.device)
    size_fits(run.resolution, family)
    family.place_encoders(run.frozen_dtype, state.device)
    cache = EncodedCache(run.cache_dir, family, run.resolution)
    for dataset in datasets:
        fitting = fitted(dataset, family.image_size(run.resolution), family.size_multiple)
        prepare_cache(cache, fitting, run, state)
    return cache
