"""Substreams: every row once an epoch, wherever shards end; each process reads its own."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import pytest
from support.samples import COUNT, SHARDS, parquet_folder

from stepdistill.data.hub import HubStream, Streamed, load_rows, shard_rows
from stepdistill.data.stream import stream
from stepdistill.data.substreams import Substreams

SETS = [
    ((5, 9, 3, 7), 4), ((5, 0, 9, 0, 3), 6), ((1,) * 30, 7), ((40,), 8), ((100,) * 33, 64),
    ((2, 3), 5),
]  # fmt: skip


@pytest.mark.parametrize(("shards", "batch"), SETS)
def test_an_epoch_has_every_row_once(shards, batch) -> None:
    substreams = Substreams(shards, batch, seed=3)
    everything = Counter((s, row) for s, size in enumerate(shards) for row in range(size))
    for epoch in range(4):
        read: Counter[tuple[int, int]] = Counter()
        for substream in range(substreams.number):
            pieces = substreams.pieces(epoch, substream)
            read.update((s, row) for s, begin, end in pieces for row in range(begin, end))
            first, end = substreams.span(epoch, substream)
            assert sum(e - b for _, b, e in pieces) == end - first
        assert read == everything


@pytest.mark.parametrize(("shards", "batch"), SETS)
def test_places_and_positions_are_each_other_s(shards, batch) -> None:
    substreams = Substreams(shards, batch, seed=0)
    places = Counter[int]()
    for position in range(500):
        substream = substreams.at(position)
        assert substreams.before(position, substream) == places[substream]
        assert substreams.position(places[substream], substream) == position
        places[substream] += 1
    assert all(
        substreams.before(500, substream) == places[substream]
        for substream in range(substreams.number)
    )


def test_substreams_are_at_most_as_many_as_shards_and_as_a_process_can_read() -> None:
    numbers = [Substreams((10,) * count, 64, 0).number for count in (1, 3, 8, 31, 32, 1000)]
    assert numbers == [1, 2, 8, 16, 32, 32]


def test_a_substream_has_other_shards_in_another_epoch_and_run() -> None:
    shards = (10,) * 32
    found = [Substreams(shards, 8, seed).pieces(epoch, 0) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(pieces) for pieces in found}) == 4


# ---------------------------------------------------------------------- what is read
def written(shards: list[int], log: str):
    """Rows that note who reads them."""
    for shard in shards:
        for row in range(100):
            with Path(log).open("a") as file:
                file.write(f"{shard} {row}\n")
            yield {"text": f"thing {100 * shard + row}"}


def split(folder: Path, rank: int, batches: int, num_shards: int, start: int = 0):
    """(numbers in the batches of a rank with two workers of a world of two, rows read for them)."""
    log = folder / f"{rank}-{num_shards}-{start}.log"
    source = datasets.IterableDataset.from_generator(
        written, gen_kwargs={"shards": list(range(num_shards)), "log": str(log)}
    )
    data = HubStream(Streamed(source), None, "image", "text", buffer=160)
    log.unlink()  # the rows were counted
    found = islice(stream(data, 4, 7, rank, 2, start, num_workers=2), batches)
    seen = [int(text.split()[1]) for raw in found for text in raw["prompt"]]
    return seen, len(log.read_text().splitlines())


@pytest.mark.full
def test_two_ranks_of_two_workers_read_their_own_shards(tmp_path) -> None:
    """16 shards of 100 rows; 100 batches of 4 a rank are half of an epoch for each."""
    parts = [split(tmp_path, rank, 200, 16) for rank in (0, 1)]
    assert sorted(n for seen, _ in parts for n in seen) == list(range(1600))
    for _, read in parts:  # both workers of the rank together; one substream would be 3,200
        assert 800 <= read < 1300


@pytest.mark.full
def test_resume_opens_no_shard_that_was_gone_through(tmp_path) -> None:
    """64 shards in 32 substreams of two, 16 of them this rank's: of each the second is left."""
    whole, _ = split(tmp_path, 0, 540, 64)
    rest, read = split(tmp_path, 0, 40, 64, start=500)
    assert rest == whole[4 * 500 :]
    assert read <= 1600


@pytest.mark.full
def test_too_few_shards_are_read_by_all(tmp_path) -> None:
    parts = [split(tmp_path, rank, 50, 1) for rank in (0, 1)]
    assert len({n for seen, _ in parts for n in seen}) == 100


# ----------------------------------------------------------------------- rows of shards
def test_parquet_footers_tell_rows_of_shards(tmp_path, monkeypatch) -> None:
    found = load_rows(str(parquet_folder(tmp_path)), streaming=True)
    monkeypatch.setattr(datasets.IterableDataset, "iter", None)  # nothing else is read
    assert shard_rows(found, "train", "text") == list(SHARDS)


def test_other_shards_are_counted_or_taken_as_one(tmp_path) -> None:
    rows = load_rows(str(parquet_folder(tmp_path)), streaming=True).rows
    assert shard_rows(Streamed(rows), "train", "text") == list(SHARDS)
    stated = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=COUNT)})
    rows.info.splits = stated
    assert shard_rows(Streamed(rows), "train", "text") == [COUNT]


def test_the_order_is_the_one_of_earlier_versions() -> None:
    """Runs that began before go on where they were: a new name in the code changes no draw."""
    substreams = Substreams((3,) * 8, 8, 0)
    first = [substreams.pieces(1, k) for k in range(substreams.number)]
    assert first == [[(shard, 0, 3)] for shard in (2, 3, 5, 1, 7, 4, 6, 0)]
