"""The same few samples in every form that data comes in; each image's colour is its number."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import webdataset
from PIL import Image

from stepdistill.data.hub import HubDataset, HubStream, load_rows
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.stream import PromptDataset, stream
from stepdistill.data.tars import TarDataset

SIZE = 8  # px
SHARDS = (5, 9, 3, 7)
COUNT = sum(SHARDS)
KINDS = ("prompts", "images", "tars", "rows", "stream")


def png(number: int) -> bytes:
    """A plain image of that grey level."""
    file = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), number, np.uint8)).save(file, "png")
    return file.getvalue()


def broken(number: int) -> bytes:
    """An image whose file ends too early."""
    return png(number)[:-30]


def caption(number: int) -> str:
    return f"thing {number:02d}"


def number_of(image: Any) -> int:
    """The number of a plain image (3, H, W) in [-1, 1]."""
    return round(float(image.mean()) * 127.5 + 127.5)


def image_folder(folder: Path, bad: Sequence[int] = (), count: int = COUNT) -> Path:
    """A folder with metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        (folder / f"{i:02d}.png").write_bytes(broken(i) if i in bad else png(i))
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": caption(i)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def tar_folder(folder: Path, bad: Sequence[int] = ()) -> Path:
    """Shards of unequal sizes, written by webdataset itself."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = iter(range(COUNT))
    for shard, size in enumerate(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:04d}.tar")) as tar:
            for i in islice(numbers, size):
                image = broken(i) if i in bad else png(i)
                tar.write({"__key__": f"{i:04d}", "png": image, "txt": caption(i)})
    return folder


def parquet_folder(folder: Path, bad: Sequence[int] = (), images: bool = True) -> Path:
    """A folder of parquet files, as on the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = iter(range(COUNT))
    for shard, size in enumerate(SHARDS):
        own = list(islice(numbers, size))
        columns: dict[str, list[Any]] = {"text": [caption(i) for i in own]}
        if images:
            found = [broken(i) if i in bad else png(i) for i in own]
            columns["image"] = [{"bytes": data, "path": None} for data in found]
        table = datasets.Dataset.from_dict(columns)
        if images:
            table = table.cast_column("image", datasets.Image())
        table.to_parquet(str(folder / f"train-{shard:05d}.parquet"))
    return folder


def dataset_of(kind: str, folder: Path, bad: Sequence[int] = ()) -> Any:
    """The samples as one of KINDS."""
    if kind == "prompts":
        (folder / "prompts.txt").write_text("\n".join(caption(i) for i in range(COUNT)))
        return PromptDataset.from_file(folder / "prompts.txt")
    if kind == "images":
        return ImageFolderDataset(image_folder(folder / "images", bad), None)
    if kind == "tars":
        return TarDataset(str(tar_folder(folder / "tars", bad)), None, window=10)
    where = parquet_folder(folder / "parquet", bad)
    found = load_rows(str(where), streaming=kind == "stream")
    if kind == "rows":
        return HubDataset(found, None, "image", "text")
    return HubStream(found, None, "image", "text", buffer=6)


def told(raw: dict[str, Any]) -> list[int]:
    """Numbers of a batch by its prompts; its images must be the same."""
    numbers = [int(text.split()[-1]) for text in raw["prompt"]]
    if "image" in raw:
        assert [number_of(image) for image in raw["image"]] == numbers
    return numbers


def batches(dataset: Any, count: int, batch: int = 2, **options: Any) -> Iterator[list[int]]:
    """The first `count` batches of a stream, as numbers."""
    return (told(raw) for raw in islice(stream(dataset, batch, 7, **options), count))


# Height and width in px of pictures for the buckets of a model of 16 px: square, wide and high.
SHAPES = ((16, 16), (16, 32), (32, 16))


def picture(number: int, shape: tuple[int, int], kind: str = "png", **options: Any) -> bytes:
    """A plain image of that grey level, (height, width) in px."""
    file = io.BytesIO()
    Image.fromarray(np.full((*shape, 3), number, np.uint8)).save(file, kind, **options)
    return file.getvalue()


def sized_folder(folder: Path, shapes: Sequence[tuple[int, int]], bad: Sequence[int] = ()) -> Path:
    """A folder of pictures of these shapes with metadata.jsonl."""
    folder.mkdir()
    rows = []
    for i, shape in enumerate(shapes):
        data = picture(i, shape)
        (folder / f"{i:03d}.png").write_bytes(data[:-30] if i in bad else data)
        rows.append(json.dumps({"file_name": f"{i:03d}.png", "text": caption(i)}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder
