"""Aspect-ratio buckets: their sizes, who comes when, and what a run makes of them."""

from __future__ import annotations

import math
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.samples import SHAPES, picture, sized_folder

from stepdistill.config.run import DataConfig
from stepdistill.data.buckets import BucketOrder, bucket_sizes, nearest
from stepdistill.data.decode import picture_size
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.source import fitted
from stepdistill.data.stream import stream


def data_of(folder: Path, bad: tuple[int, ...] = ()) -> Any:
    """13 square pictures, 6 wide and 2 high ones, in buckets about 16 px."""
    shapes = [SHAPES[0]] * 13 + [SHAPES[1]] * 6 + [SHAPES[2]] * 2
    data = ImageFolderDataset(sized_folder(folder, shapes, bad), None)
    data.by_ratio = True
    return fitted(data, (16, 16), 2)


def numbers(raw: dict[str, Any]) -> list[int]:
    return [int(text.split()[-1]) for text in raw["prompt"]]


# ------------------------------------------------------------------ sizes
@pytest.mark.parametrize(
    ("size", "multiple", "step"),
    [((1024, 1024), 16, 64), ((1024, 1024), 64, 64), ((512, 512), 64, 64), ((16, 16), 2, 2)],
)
def test_sizes_are_about_the_model_s_area(size, multiple, step) -> None:
    sizes = bucket_sizes(size, multiple)
    assert sizes[0] == size
    assert len(set(sizes)) == len(sizes) >= 5
    for height, width in sizes:
        assert height % step == width % step == 0
        assert (width, height) in sizes
        assert 0.5 <= height / width <= 2.0
        assert abs(math.log(height * width / math.prod(size))) < 0.15


def test_the_known_sizes_of_sdxl_are_there() -> None:
    assert {(1024, 1024), (832, 1216), (896, 1152), (768, 1344)} <= set(
        bucket_sizes((1024,) * 2, 8)
    )


def test_a_picture_goes_to_the_nearest_ratio() -> None:
    sizes = bucket_sizes((1024, 1024), 64)
    assert sizes[nearest(sizes, (100, 100))] == (1024, 1024)
    assert sizes[nearest(sizes, (1080, 1920))] == (768, 1344)
    assert sizes[nearest(sizes, (3000, 1000))][0] > sizes[nearest(sizes, (3000, 1000))][1]


def test_the_size_of_a_file_is_the_one_that_is_shown() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture(3, (400, 800), "jpeg", exif=exif)
    assert picture_size(data) == (800, 400)
    assert picture_size(picture(3, (400, 800))[:64]) == (400, 800)


# ------------------------------------------------------------------ order
def test_every_row_comes_once_in_its_bucket_s_epoch() -> None:
    buckets = np.array([0] * 13 + [1] * 6 + [2] * 2, dtype=np.int16)
    order, batch = BucketOrder(buckets, 4, 0), 4
    rows = [order[k] for k in range(batch * 21 * 4)]
    for start in range(0, len(rows), batch):
        assert len({buckets[r] for r in rows[start : start + batch]}) == 1
    for bucket, size in ((0, 13), (1, 6), (2, 2)):
        own = [r for r in rows if buckets[r] == bucket]
        assert len(own) == 16 * size  # 16 epochs: as often as it has rows
        for epoch in range(16):
            assert len(set(own[epoch * size : (epoch + 1) * size])) == size
    assert set(Counter(rows).values()) == {16}


def test_any_position_is_reached_without_those_before_it() -> None:
    buckets = np.array([0, 1, 1, 0, 2, 0, 0], dtype=np.int16)
    order = BucketOrder(buckets, 3, 5)
    whole = [order[k] for k in range(600)]
    assert [BucketOrder(buckets, 3, 5)[k] for k in (599, 0, 301)] == [
        whole[k] for k in (599, 0, 301)
    ]
    assert whole != [BucketOrder(buckets, 3, 6)[k] for k in range(600)]


# ------------------------------------------------------------------ the stream
def test_batches_are_of_one_shape_and_ranks_are_parts_of_one_process(tmp_path) -> None:
    data = data_of(tmp_path / "in")
    whole = list(islice(stream(data, 4, 7), 21))
    for raw in whole:
        (size,) = set(raw["size"])
        assert tuple(raw["image"].shape[-2:]) == size
        for number in numbers(raw):
            assert size == data.size_of(number)
    assert len({raw["size"][0] for raw in whole}) == 3
    ranks = [list(islice(stream(data, 2, 7, rank, 2, 5), 16)) for rank in (0, 1)]
    both = [numbers(a) + numbers(b) for a, b in zip(*ranks, strict=True)]
    assert both == [numbers(raw) for raw in whole[5:]]


def test_workers_and_resume(tmp_path) -> None:
    data = data_of(tmp_path / "in")
    whole = [numbers(raw) for raw in islice(stream(data, 2, 7), 20)]
    rest = islice(stream(data, 2, 7, start=9, num_workers=2), 11)
    assert [numbers(raw) for raw in rest] == whole[9:]


@pytest.mark.filterwarnings("ignore:data:UserWarning")
def test_what_stands_in_has_the_batch_s_shape(tmp_path) -> None:
    """Both high pictures are cut off: others are cropped to their size."""
    data = data_of(tmp_path / "in", bad=(19, 20))
    high = data.size_of(20)
    assert high[0] > high[1]
    found = [raw for raw in islice(stream(data, 2, 7), 21) if raw["size"][0] == high]
    assert found
    for raw in found:
        assert tuple(raw["image"].shape[-2:]) == high
        assert not {19, 20} & set(numbers(raw))


def test_without_buckets_every_image_has_the_model_s_size(tmp_path) -> None:
    data = ImageFolderDataset(sized_folder(tmp_path / "in", [(8, 24), (16, 16), (64, 32)]), None)
    raw = next(stream(fitted(data, (16, 24), 2), 3, 0))
    assert raw["image"].shape == (3, 3, 16, 24)
    assert "size" not in raw
    assert data.size_px is None  # the user's own object is not changed


# ------------------------------------------------------------------ options
@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({}, "None"),
        ({"prompts_file": "p.txt"}, "prompts_file"),
        ({"pairs_dir": "p"}, "pairs_dir"),
        ({"dataset_name": "d", "streaming": True}, "'d' streamed"),
        ({"train_data_dir": "d", "gan": {"train_data_dir": "g"}}, "train_data_dir"),
    ],
)
def test_what_has_no_buckets_is_refused_at_once(options, got) -> None:
    with pytest.raises(ValueError, match=rf"data\.buckets: expected .* got {got}"):
        DataConfig(buckets=True, **options)
    assert DataConfig(buckets=True, tar_shards="t").buckets
