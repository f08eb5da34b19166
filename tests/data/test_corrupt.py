"""Unreadable samples are replaced alike every time, counted and named; too many are fatal."""

from __future__ import annotations

from itertools import islice

import pytest
from support.samples import COUNT, batches, dataset_of, image_folder, png, told

from stepdistill.data.corrupt import CorruptItemError, CorruptLog
from stepdistill.data.decode import decode_image
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.stream import provided_fields, stream

BAD = (4, 11, 17)
pytestmark = pytest.mark.filterwarnings("ignore:data:UserWarning")


@pytest.fixture(params=["images", "tars", "rows", "stream"])
def kind(request):
    return request.param


@pytest.mark.full
def test_good_samples_stay_where_they_are(kind, tmp_path) -> None:
    whole = list(batches(dataset_of(kind, tmp_path / "whole"), 24, batch=3))
    rest = list(batches(dataset_of(kind, tmp_path / "bad", BAD), 24, batch=3))
    for before, after in zip(whole, rest, strict=True):
        assert not set(after) & set(BAD)
        kept = [(a, b) for a, b in zip(before, after, strict=True) if a not in BAD]
        assert all(a == b for a, b in kept)


@pytest.mark.full
def test_replacements_repeat_with_ranks_workers_and_resume(kind, tmp_path) -> None:
    data = dataset_of(kind, tmp_path, BAD)
    whole = list(batches(data, 24, batch=4))
    parts = [
        list(batches(data, 17, batch=2, rank=r, world_size=2, start=7, num_workers=2))
        for r in (0, 1)
    ]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole[7:]


def test_they_are_counted_and_named(kind, tmp_path) -> None:
    data, log = dataset_of(kind, tmp_path, BAD), CorruptLog(0.05)
    batch, epochs = 4, 2
    seen = islice(stream(data, batch, 7, corrupt=log), epochs * COUNT // batch)
    assert sum(len(told(raw)) for raw in seen) == log.draws == epochs * COUNT
    assert log.replaced >= epochs * len(BAD)  # a replacement may be unreadable too
    assert len(log.names) == len(BAD)


@pytest.mark.full
def test_a_stream_takes_the_next_row(tmp_path) -> None:
    """Four shards and four samples a batch: each place in a batch is a substream.

    There an unreadable row is the next that can be read.
    """
    whole = list(batches(dataset_of("stream", tmp_path / "a"), 12, batch=4))
    rest = list(batches(dataset_of("stream", tmp_path / "b", BAD), 12, batch=4))
    for substream, found in zip(zip(*whole, strict=True), zip(*rest, strict=True), strict=True):
        expected, last = [], substream[0]
        for number in reversed(substream):
            last = last if number in BAD else number
            expected.append(last)
        assert list(found)[:-3] == expected[::-1][:-3]  # the last few look past what was read


def test_too_many_end_the_run(tmp_path) -> None:
    data = ImageFolderDataset(image_folder(tmp_path, BAD), None)
    data_stream = stream(data, 4, 0, corrupt=CorruptLog(0.002))
    with pytest.raises(ValueError, match=r"max_corrupt_fraction.*[34] of \d+ \(\d\d\.png"):
        list(islice(data_stream, 50))


def test_none_allowed(tmp_path) -> None:
    data = ImageFolderDataset(image_folder(tmp_path, (0, 1)), None)
    with pytest.raises(ValueError, match="at most 0 of the samples"):
        list(islice(stream(data, COUNT, 0, corrupt=CorruptLog(0.0)), 2))


def test_nothing_readable_ends_at_once(tmp_path) -> None:
    data = ImageFolderDataset(image_folder(tmp_path, range(COUNT)), None)
    with pytest.raises(ValueError, match="none among the first"):
        provided_fields(data)
    with pytest.raises(ValueError, match="100 unreadable ones"):
        next(stream(data, 2, 0))


def test_fields_are_read_off_the_first_good_item(tmp_path) -> None:
    data = ImageFolderDataset(image_folder(tmp_path, (0, 1)), None)
    assert provided_fields(data) == {"cond", "prompts", "x0"}


def test_a_warning_names_the_file_once() -> None:
    with pytest.warns(UserWarning, match=r"a\.png can't be read") as told:
        CorruptLog(1.0).add(4, ["a.png", "a.png"])
    assert len(told) == 1


@pytest.mark.parametrize(
    "data", [b"", b"no image", png(3)[:40], png(3)[:-30], b"\x89PNG\r\n\x1a\n" + b"\0" * 100]
)
def test_broken_bytes(data) -> None:
    with pytest.raises(CorruptItemError, match=r"x\.png"):
        decode_image(data, "x.png", None)


def test_a_file_that_vanished(tmp_path) -> None:
    data = ImageFolderDataset(image_folder(tmp_path), None)
    (tmp_path / "03.png").unlink()
    with pytest.raises(CorruptItemError, match=r"03\.png"):
        data[3]
