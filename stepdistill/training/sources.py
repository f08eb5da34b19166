"""The dataset that a run's --data options name."""

from __future__ import annotations

from typing import Any

from stepdistill.config.run import RunConfig, SourceConfig
from stepdistill.data.hub import HubDataset, HubStream, load_rows
from stepdistill.data.images import ImageFolderDataset, LabelFileDataset
from stepdistill.data.stream import EmptyRows, PromptDataset
from stepdistill.data.tars import TarDataset
from stepdistill.families.registry import teacher_facts


def open_dataset(run: RunConfig) -> Any:
    """The dataset of a RunConfig's one data source. Errors: ValueError where there is none."""
    told = teacher_facts(run.source).conditioning  # refuses unserved classes first
    if told == "none" and run.data.prompts_file is not None:
        raise ValueError(
            "data: expected images or no data for an unconditional model, got a prompts_file. "
            "Leave it out, or give --data.train_data_dir."
        )
    if run.data.source is not None:
        return _open(run.data, told, run)
    if told == "none":
        return EmptyRows()
    raise ValueError(
        "data: expected one of --data.prompts_file, --data.train_data_dir, --data.tar_shards, "
        "--data.dataset_name, --data.pairs_dir, got none."
    )


def open_gan_dataset(run: RunConfig) -> Any:
    """The dataset of --data.gan, or None where the run has none."""
    if run.data.gan.source is None:
        return None
    return _open(run.data.gan, teacher_facts(run.source).conditioning, run)


def _open(data: SourceConfig, told: str, run: RunConfig) -> Any:
    by_label = told == "label"
    if data.prompts_file is not None:
        source = LabelFileDataset if by_label else PromptDataset
        return source.from_file(data.prompts_file)
    if data.train_data_dir is not None:
        return ImageFolderDataset(data.train_data_dir, run.resolution, by_label, told == "none")
    if data.pairs_dir is not None:
        from stepdistill.pairs.dataset import PairDataset

        return PairDataset(data.pairs_dir)
    return open_shards(data, told, run.resolution, run.cache_dir)


def open_shards(
    data: SourceConfig, told: str, resolution: int | None, index_dir: str | None
) -> TarDataset | HubDataset | HubStream:
    """The dataset of tar shards, or of the `datasets` library."""
    column = data.caption_column
    if data.tar_shards is not None:
        window = data.shuffle_buffer
        return TarDataset(data.tar_shards, resolution, told, column, window, index_dir)
    assert data.dataset_name is not None
    found = load_rows(
        data.dataset_name,
        data.dataset_config_name,
        data.dataset_split,
        data.dataset_revision,
        data.streaming,
    )
    columns = (resolution, data.image_column, column, told)
    if data.streaming:
        return HubStream(found, *columns, data.shuffle_buffer, data.dataset_split)
    return HubDataset(found, *columns)
