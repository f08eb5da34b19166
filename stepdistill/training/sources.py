"""The dataset that a run's --data options name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepdistill.config.files import method_class
from stepdistill.config.run import RunConfig, SourceConfig
from stepdistill.core.types import CONDITIONING
from stepdistill.data.degradation import check_factor
from stepdistill.data.hub import HubDataset, HubStream, load_rows
from stepdistill.data.images import ImageFolderDataset, LabelFileDataset
from stepdistill.data.metadata import Beside, beside_columns
from stepdistill.data.preferences import PreferenceFile, PreferenceRows
from stepdistill.data.stream import EmptyRows, PromptDataset
from stepdistill.data.tars import TarDataset
from stepdistill.families.beside import fields_beside
from stepdistill.families.registry import TeacherFacts, teacher_facts


def open_dataset(run: RunConfig) -> Any:
    """The dataset of a RunConfig's one data source. Errors: ValueError where there is none."""
    facts = teacher_facts(run.source)  # refuses unserved classes first
    conditioning = facts.conditioning
    if conditioning == "none" and run.data.prompts_file is not None:
        raise ValueError(
            "data: expected images or no data for an unconditional model, got a prompts_file. "
            "Leave it out, or give --data.train_data_dir."
        )
    _reads_image(run, facts)
    if run.data.source is not None:
        dataset = _open(run.data, facts, run)
        if run.data.degradation.factor:
            dataset.degradation = run.data.degradation
        if run.data.buckets:
            dataset.by_ratio = True
        return dataset
    if conditioning == "none":
        return EmptyRows()
    raise ValueError(
        "data: expected one of --data.prompts_file, --data.train_data_dir, --data.tar_shards, "
        "--data.dataset_name, --data.pairs_dir, --data.preferences_file, got none."
    )


def open_gan_dataset(run: RunConfig) -> Any:
    """The dataset of --data.gan, or None where the run has none."""
    if run.data.gan.source is None:
        return None
    dataset = _open(run.data.gan, teacher_facts(run.source), run)
    if run.data.degradation.factor:
        dataset.degradation = run.data.degradation
    return dataset


def _reads_image(run: RunConfig, facts: TeacherFacts) -> None:
    """Errors: ValueError for low-resolution images that the model does not read, or of a size that
    they do not divide."""
    rule = run.data.degradation
    if rule.factor is None:
        return
    if not facts.family.edits_image():
        raise ValueError(
            "data.degradation.factor: expected a model that reads an image beside the prompt, as "
            f"StableDiffusionUpscalePipeline, got {facts.pipeline}. Leave it out, or name one."
        )
    check_factor(rule, run.resolution)


def _open(data: SourceConfig, facts: TeacherFacts, run: RunConfig) -> Any:
    rule, conditioning = run.data.degradation, facts.conditioning
    if rule.factor and rule.prompt is not None:
        conditioning = "none"  # no captions are read
    by_label = conditioning == "label"
    if data.prompts_file is not None:
        if by_label:
            return LabelFileDataset.from_file(data.prompts_file, facts.num_labels)
        return PromptDataset.from_file(data.prompts_file)
    if data.train_data_dir is not None:
        options = (by_label, conditioning == "none", data.caption_column, facts.num_labels)
        return ImageFolderDataset(
            data.train_data_dir, run.resolution, *options, _beside(data, facts, run)
        )
    if data.preferences_file is not None:
        pairs = (data.preferences_file, run.resolution, conditioning, data.caption_column)
        return PreferenceFile(*pairs, facts.num_labels)
    if data.pairs_dir is not None:
        from stepdistill.pairs.dataset import PairDataset

        return PairDataset(data.pairs_dir)
    if data.dataset_name is not None and method_class(run.method).data == "preferences":
        if data.streaming:
            raise ValueError(
                "data.streaming: expected a dataset that is downloaded, as ties among its "
                f"preferences are left out by number, got {data.dataset_name!r} streamed. Leave "
                "it out, or write some of the pairs to a --data.preferences_file."
            )
        columns = (run.resolution, data.caption_column, conditioning, facts.num_labels)
        return PreferenceRows(_rows(data), *columns)
    shards = (data, conditioning, run.resolution, run.cache_dir, facts.num_labels)
    return open_shards(*shards, _beside(data, facts, run))


def _beside(data: SourceConfig, facts: TeacherFacts, run: RunConfig) -> dict[str, Beside]:
    """Columns of what the model reads beside the prompt, but for what is made of the image."""
    made = (CONDITIONING,) if run.data.degradation.factor else ()
    fields = {k: v for k, v in fields_beside(facts.family).items() if k not in made}
    return beside_columns(fields, data.conditioning_column, data.mask_column)


def open_shards(
    data: SourceConfig,
    conditioning: str,
    resolution: int | None,
    index_dir: str | None,
    num_labels: int | None = None,
    beside: Mapping[str, Beside] | None = None,
) -> TarDataset | HubDataset | HubStream:
    """The dataset of tar shards, or of the `datasets` library."""
    column = data.caption_column
    if data.tar_shards is not None:
        options = (data.shuffle_buffer, index_dir, num_labels)
        return TarDataset(data.tar_shards, resolution, conditioning, column, *options)
    rows = _rows(data)
    columns = (resolution, data.image_column, column, conditioning)
    if data.streaming:
        order = (data.shuffle_buffer, data.dataset_split)
        return HubStream(rows, *columns, *order, num_labels, beside)
    return HubDataset(rows, *columns, num_labels, beside)


def _rows(data: SourceConfig) -> Any:
    assert data.dataset_name is not None, "the caller has looked"
    return load_rows(
        data.dataset_name,
        data.dataset_config_name,
        data.dataset_split,
        data.dataset_revision,
        data.streaming,
    )
