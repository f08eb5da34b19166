"""What every source of images has in common: bytes in, (prompt, image, hash of the bytes) out."""

# Shapes: H, W in px; images (3, H, W) in [-1, 1].

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from stepdistill.data.buckets import BucketOrder, bucket_sizes, nearest
from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.decode import Size, decode_beside, decode_image, image_content, picture_size
from stepdistill.data.degradation import Degradation, check_factor
from stepdistill.data.order import EpochOrder
from stepdistill.data.rows import RowStream

_HEAD = 1 << 16  # bytes that tell most pictures' size
_THREADS = 16  # that read them


class Source(Dataset[dict[str, Any]], ABC):
    """Samples of bytes, by number.

    Attributes: size_px: what images are resized and cropped to: a square's side, or (height,
        width); None means the model's own size in a run, and the file's elsewhere. by_ratio:
        whether a run puts them into buckets of several sizes about that one. known: tells of a
        content name that its latents are at hand, so that the image need not be decoded; its item
        has no "image" then. degradation: the low-resolution images that are made of each, where it
        says so; px_beside: px of the image that one of theirs stands for; with_easier: whether the
        easier ones are made, too.
    """

    def __init__(self, size_px: int | None) -> None:
        self.size_px: int | Size | None = size_px
        self.by_ratio = False
        self.known: Callable[[str], bool] | None = None
        self.degradation: Degradation | None = None
        self.px_beside, self.with_easier = 1, True
        self._sizes: Sequence[Size] = ()  # of the buckets
        self._buckets: NDArray[np.int16] | None = None  # of each row

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def condition(self, index: int) -> dict[str, Any]:
        """{"prompt": text}, {"label": number} or nothing: a sample without its image."""

    @abstractmethod
    def image_bytes(self, index: int, most: int = -1) -> tuple[bytes, str] | None:
        """The image's file and a name for it, or None where samples have no images.

        Args: most: bytes of the file that are wanted, from its beginning; -1 for all.
        Errors: CorruptItemError where it can't be read.
        """

    def beside_bytes(self, index: int) -> Mapping[str, Sequence[tuple[bytes, str]]]:
        """Files of its images beside the one it becomes, by their keys in an item.

        Errors: CorruptItemError where one can't be read.
        """
        return {}

    def order(self, seed: int) -> EpochOrder | None:
        """The order of its epochs; None means the one of a set without shards."""
        return None

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, self.size_of(index))

    def item(self, index: int, size: int | Size | None) -> dict[str, Any]:
        """The item of a row, its image of that size. Errors: CorruptItemError."""
        return {
            **self.condition(index),
            **decoded(self.image_bytes(index), size, self.known),
            **decode_beside(self.beside_bytes(index), size),
            **({"size": size} if self.has_buckets else {}),
        }

    # ----------------------------------------------------------------- buckets
    @property
    def has_buckets(self) -> bool:
        """Whether its images are of the sizes of buckets; its items have a "size" then."""
        return self._buckets is not None

    def size_of(self, index: int) -> int | Size | None:
        """What the image of a row is resized and cropped to."""
        return self.size_px if self._buckets is None else self._sizes[int(self._buckets[index])]

    def bucketed(self, sizes: Sequence[Size]) -> Source:
        """A copy whose images have the size of the nearest ratio; every picture's own is looked up.

        Errors: ValueError where samples have no images.
        """
        if self.image_bytes(0, 0) is None:
            raise ValueError("data.buckets: expected a source of images, got prompts alone.")
        made = copy(self)
        with ThreadPoolExecutor(_THREADS) as pool:
            buckets = pool.map(lambda index: self._bucket(index, sizes), range(len(self)))
            made._sizes, made._buckets = sizes, np.fromiter(buckets, np.int16, len(self))
        return made

    def _bucket(self, index: int, sizes: Sequence[Size]) -> int:
        for most in (_HEAD, -1):
            try:
                named = self.image_bytes(index, most)
                assert named is not None
                return nearest(sizes, picture_size(named[0]))
            except CorruptItemError:
                return 0
            except Exception:  # decoders raise whatever cut files make them
                continue
        return 0  # unreadable: counted, and replaced, where it is drawn

    def bucket_order(self, seed: int, batch: int) -> BucketOrder | None:
        """The order of its global batches of that many samples, where it has buckets."""
        return None if self._buckets is None else BucketOrder(self._buckets, batch, seed)


def file_bytes(path: Path, most: int = -1) -> tuple[bytes, str]:
    """See Source.image_bytes, of a file."""
    try:
        with path.open("rb") as file:
            return file.read(most), path.name
    except OSError as err:
        raise CorruptItemError(path.name) from err


def pictures(item: dict[str, Any]) -> list[dict[str, Any]]:
    """The {"image", "content"} of an item, either of them perhaps missing; two of a pair."""
    made = []
    for image, content in (("image", "content"), ("rejected", "rejected_content")):
        names = {"image": image, "content": content}
        one = {name: item[key] for name, key in names.items() if key in item}
        made += [one] if one else []
    return made


def fitted(
    dataset: Any, size: Size, multiple: int, px_beside: int = 1, easier: bool = False
) -> Any:
    """A run's dataset with its images of the model's size (height, width in px), where it is one
    that reads pictures and states no other, and in buckets where it asks for them.

    Args: multiple: px that the model needs sides to be multiples of. px_beside: see Source. easier:
        whether easier low-resolution images are wanted, too.
    Errors: ValueError for images whose sides a low resolution does not divide.
    """
    if not isinstance(dataset, Source | RowStream):
        return dataset
    dataset = copy(dataset)
    if dataset.size_px is None:
        dataset.size_px = size
    if isinstance(dataset, Source) and dataset.by_ratio:
        one = dataset.size_px
        sizes = bucket_sizes((one, one) if isinstance(one, int) else one, multiple)
        dataset = dataset.bucketed(sizes)
    for shape in getattr(dataset, "_sizes", ()) or (dataset.size_px,):
        check_factor(dataset.degradation, shape)
    dataset.px_beside, dataset.with_easier = px_beside, easier
    return dataset


def sizes_of(dataset: Any) -> Any:
    """What sizes a dataset's images have, for a record: one, a list of buckets, or None."""
    return getattr(dataset, "_sizes", ()) or getattr(dataset, "size_px", None)


def decoded(
    named_bytes: tuple[bytes, str] | None,
    size_px: int | Size | None,
    known: Callable[[str], bool] | None,
) -> dict[str, Any]:
    """{"image", "content"} of an image's (bytes, name), without the image where it is known."""
    if named_bytes is None:
        return {}
    content = image_content(named_bytes[0], size_px)
    if known is not None and known(content):
        return {"content": content}
    return {"image": decode_image(*named_bytes, size_px), "content": content}
