"""Datasets of the `datasets` library, downloaded (rows by number) or streamed (shard by shard).

Images stay undecoded bytes until a worker needs them. A streamed epoch takes the shards in an order
of (seed, epoch) and shuffles rows in the library's own buffer; a position within a shard is reached
by skipping.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.data.captions import caption_of, label_of
from stepdistill.data.corrupt import CorruptItemError
from stepdistill.data.decode import decode_beside
from stepdistill.data.fingerprint import list_digest
from stepdistill.data.metadata import CAPTION_COLUMNS, FILE_COLUMNS, Beside, first_name
from stepdistill.data.rows import RowStream
from stepdistill.data.source import Source, decoded

_READ = 64  # rows taken from the library at a time, by all substreams
_THREADS = 16  # that read the footers of parquet files


def _library() -> Any:
    try:
        import datasets
    except ImportError as err:
        raise ValueError(
            "dataset_name: expected the datasets library, which is not installed. "
            'pip install "stepdistill[datasets]"'
        ) from err
    return datasets


class Columns:
    """Which columns of a dataset are its image and its caption or label.

    Args: image: column of images; one that is not there means prompts alone. key: what is told
        beside an image: "prompt", "label" or "none". features: the columns' types where they are
        known. num_labels: of the model, where it is known. beside: further images by their keys
        (see metadata.Beside); a column of them may hold lists, all of one length.
    Errors: ValueError where a column that is needed is not there, or has values of another type.
    """

    def __init__(
        self,
        names: list[str],
        image: str,
        caption: str,
        key: str,
        features: Mapping[str, Any] | None = None,
        num_labels: int | None = None,
        beside: Mapping[str, Beside] | None = None,
    ) -> None:
        self.beside = _beside(names, beside or {})
        if self.beside:  # columns as editing sets call them
            image = first_name(names, (image, *(FILE_COLUMNS if image == "image" else ()))) or image
            captions = CAPTION_COLUMNS if caption == "text" else ()
            caption = first_name(names, (caption, *captions)) or caption
        if key == "none" and image not in names:
            raise ValueError(
                f"image_column: expected one of {sorted(names)}, got {image!r}. "
                "Name the column of images: --data.image_column."
            )
        if key != "none" and caption not in names:
            raise ValueError(
                f"caption_column: expected one of {sorted(names)}, got {caption!r}. "
                "Name the column of captions (or labels): --data.caption_column."
            )
        if key != "none" and features is not None:
            _check_type(caption, features[caption], key)
        self.image = image if image in names else None
        self.caption, self.key, self.num_labels = caption, key, num_labels

    @property
    def wanted(self) -> list[str]:
        captions = [] if self.key == "none" else [self.caption]
        return [*self.images, *captions]

    @property
    def images(self) -> list[str]:
        """All columns of images."""
        return [*([] if self.image is None else [self.image]), *self.beside.values()]

    def condition(self, row: dict[str, Any], name: str) -> dict[str, Any]:
        """{"prompt"} or {"label"} of a row. Errors: CorruptItemError where it has none."""
        if self.key == "none":
            return {}
        try:
            if self.key == "label":
                return {"label": label_of(row[self.caption], self.num_labels)}
            return {"prompt": caption_of(row[self.caption])}
        except ValueError as err:
            raise CorruptItemError(f"{name} ({self.caption}: {err})") from err

    def image_bytes(self, row: dict[str, Any], name: str) -> tuple[bytes, str] | None:
        """The row's image file and its name. Errors: CorruptItemError where it can't be read."""
        return None if self.image is None else _stored(row[self.image], name)

    def beside_bytes(self, row: dict[str, Any], name: str) -> dict[str, list[tuple[bytes, str]]]:
        """See Source.beside_bytes."""
        values = {key: row[column] for key, column in self.beside.items()}
        return {
            key: [_stored(one, name) for one in (value if isinstance(value, list) else [value])]
            for key, value in values.items()
        }


def _stored(image: Any, name: str) -> tuple[bytes, str]:
    try:
        path = image["path"]
        named = Path(path).name if path else name
        return (image["bytes"] or Path(path).read_bytes()), named
    except (OSError, TypeError, KeyError) as err:
        raise CorruptItemError(name) from err


def _beside(names: list[str], beside: Mapping[str, Beside]) -> dict[str, str]:
    """Key -> column. Errors: ValueError for one that is needed and not there."""
    columns = {key: first_name(names, one.names) for key, one in beside.items()}
    absent = next((key for key, one in beside.items() if one.needed and not columns[key]), None)
    if absent is not None:
        raise ValueError(
            f"{absent}_column: expected one of {sorted(names)}, got none of the known names "
            f"({', '.join(beside[absent].names)}), and the model reads one beside the prompt. Name "
            f"it: --data.{absent}_column."
        )
    return {key: column for key, column in columns.items() if column is not None}


def _check_type(column: str, feature: Any, key: str) -> None:
    """Errors: ValueError where a column's type holds no captions (or labels)."""
    inner = getattr(feature, "feature", feature)  # of a list
    dtype = str(getattr(inner, "dtype", type(inner).__name__))
    texts, numbers = ("string", "large_string"), dtype.startswith(("int", "uint"))
    fits = (numbers or dtype in texts) and inner is feature if key == "label" else dtype in texts
    if not fits and dtype != "null":
        rule = "class labels" if key == "label" else "texts, or lists of texts"
        raise ValueError(
            f"caption_column: expected a column of {rule}, got {column!r} of "
            f"{' '.join(str(feature).split())[:100]}. Name another: --data.caption_column."
        )


def load_rows(
    name: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    streaming: bool = False,
) -> Any:
    """A split of a dataset: Hub id, folder of files, or folder of save_to_disk.

    Returns: the library's Dataset, or where streaming `Streamed`.
    Errors: ValueError where it can't be found or loaded; no code of a dataset is run.
    """
    datasets = _library()
    folder = Path(name)
    saved = (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()
    try:
        if saved:
            dataset = datasets.load_from_disk(name)
            dataset = dataset[split] if isinstance(dataset, dict) else dataset
            if not streaming:
                return dataset
            return Streamed(dataset.to_iterable_dataset(num_shards=min(len(dataset), 64) or 1))
        if not streaming:
            return datasets.load_dataset(name, config, split=split, revision=revision)
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        files = (builder.config.data_files or {}).get(split, ())
        return Streamed(builder.as_streaming_dataset(split=split), tuple(map(str, files)))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as err:
        raise ValueError(
            f"dataset_name: expected a dataset with a split {split!r}, got {name!r}: "
            f"{' '.join(str(err).split())[:300]}"
        ) from err


@dataclass(frozen=True)
class Streamed:
    """A streamed split, and the files that it is read from where they are known."""

    rows: Any
    files: tuple[str, ...] = ()


def _parquet_rows(file: str) -> int:
    """Rows of a local or remote parquet file, of which the footer alone is read."""
    import fsspec
    from pyarrow.parquet import ParquetFile

    with fsspec.open(file, "rb") as opened:
        num_rows: int = ParquetFile(opened).metadata.num_rows
    return num_rows


def shard_rows(streamed: Streamed, split: str, column: str) -> list[int]:
    """Rows of each shard, or of all as one where only their sum can be known without reading them.

    Parquet files tell theirs in their footers. Of other formats, the dataset's own statement is the
    sum; without one the rows are counted. Args: column: of few bytes, to count by.
    """
    rows, number = streamed.rows, streamed.rows.num_shards
    if len(streamed.files) == number and all(name.endswith(".parquet") for name in streamed.files):
        with ThreadPoolExecutor(min(_THREADS, number)) as pool:
            return list(pool.map(_parquet_rows, streamed.files))
    stated = (rows.info.splits or {}).get(split)
    if stated is not None and stated.num_examples:
        return [stated.num_examples]
    shards = (rows.select_columns([column]).shard(number, index) for index in range(number))
    return [sum(len(part[column]) for part in shard.iter(1000)) for shard in shards]


def undecoded(rows: Any, columns: Columns) -> Any:
    """Only the columns that are read, images as bytes."""
    rows = rows.select_columns(columns.wanted)
    plain: Any = _library().Image(decode=False)
    for name in columns.images:
        feature: Any = rows.features[name] if rows.features else None
        many = hasattr(feature, "feature")  # a list of them
        rows = rows.cast_column(name, type(feature)(plain) if many else plain)
    return rows


class HubDataset(Source):
    """A downloaded split: rows by number, in Arrow files that are mapped and not read."""

    def __init__(
        self,
        rows: Any,
        size_px: int | None,
        image: str,
        caption: str,
        key: str = "prompt",
        num_labels: int | None = None,
        beside: Mapping[str, Beside] | None = None,
    ) -> None:
        super().__init__(size_px)
        facts = (rows.features, num_labels, beside)
        self.columns = Columns(rows.column_names, image, caption, key, *facts)
        self.rows = undecoded(rows, self.columns)
        self._origin = (rows.info.dataset_name, rows.info.config_name, rows._fingerprint)
        caption = self.columns.caption
        self._texts = rows.select_columns([caption]) if key != "none" else None

    def fingerprint(self) -> str:
        """sha256 of the library's own hash of what the rows are and where they came from."""
        return list_digest(self._origin)

    def __len__(self) -> int:
        return len(self.rows)

    def condition(self, index: int) -> dict[str, Any]:
        row = {} if self._texts is None else self._texts[index]
        return self.columns.condition(row, f"row {index}")

    def image_bytes(self, index: int, most: int = -1) -> tuple[bytes, str] | None:
        if self.columns.image is None:
            return None
        return self.columns.image_bytes(self.rows[index], f"row {index}")

    def beside_bytes(self, index: int) -> dict[str, list[tuple[bytes, str]]]:
        if not self.columns.beside:
            return {}
        return self.columns.beside_bytes(self.rows[index], f"row {index}")


class HubStream(RowStream):
    """A streamed split.

    Args: buffer: rows of the shuffle buffer, held as bytes; substreams share it.
    Errors: ValueError where it has no rows, or lacks a column.
    """

    def __init__(
        self,
        streamed: Streamed,
        size_px: int | None,
        image: str,
        caption: str,
        key: str = "prompt",
        buffer: int = 4096,
        split: str = "train",
        num_labels: int | None = None,
        beside: Mapping[str, Beside] | None = None,
    ) -> None:
        names = streamed.rows.column_names or list(next(iter(streamed.rows)))
        facts = (streamed.rows.features, num_labels, beside)
        self.columns = Columns(names, image, caption, key, *facts)
        self.size_px, self.buffer = size_px, buffer
        self._rows = undecoded(streamed.rows, self.columns)
        column = self.columns.wanted[-1]  # the caption where there is one: few bytes a row
        self.shards: Sequence[int] = shard_rows(streamed, split, column)
        if not len(self):
            raise ValueError(f"dataset_name: expected at least one row, got none in {split!r}.")

    def read(
        self, shard: int, begin: int, end: int | None, key: int, skip: int, substreams: int
    ) -> Iterator[dict[str, Any]]:
        rows = self._rows
        if len(self.shards) > 1:
            rows = rows.shard(len(self.shards), shard)
        rows = rows.skip(begin) if begin else rows
        rows = rows if end is None else rows.take(end - begin)
        buffer, names = max(1, self.buffer // substreams), self.columns.wanted
        # One shard at a time: several are read by threads, which forked workers can't have.
        rows = rows.shuffle(seed=key, buffer_size=buffer, max_buffer_input_shards=1).skip(skip)
        # `iter` in place of `iter()`: the latter would split the rows among loader workers itself.
        for part in rows.iter(max(1, _READ // substreams)):
            for values in zip(*(part[name] for name in names), strict=True):
                yield dict(zip(names, values, strict=True))

    def decode(self, row: dict[str, Any]) -> dict[str, Any]:
        condition = self.columns.condition(row, "a row without caption")
        name = str(next(iter(condition.values()), "an image"))[:40]
        return {
            **condition,
            **decoded(self.columns.image_bytes(row, name), self.size_px, self.known),
            **decode_beside(self.columns.beside_bytes(row, name), self.size_px),
        }
