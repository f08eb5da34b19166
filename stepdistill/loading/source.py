"""ModelSource: one value for "which teacher", from the command line to the loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from stepdistill.loading.identity import Identity, identity_of
from stepdistill.loading.place import absolute, check_place, is_single_file
from stepdistill.loading.quantization import check_quantization
from stepdistill.loading.safe_files import check_index
from stepdistill.loading.single_file import config_source, is_whole
from stepdistill.loading.teacher_lora import lora_facts, lora_text, parse_lora
from stepdistill.storage.files import read_json

Expert = Literal["both", "high", "low"]


@dataclass(frozen=True)
class ModelSource:
    """A teacher that is not loaded yet.

    model: a Diffusers pipeline folder, a Hub id, or one .safetensors file.
    revision, variant: of the Hub; of the weight files (fp16).
    teacher_lora: `path[:scale]` of LoRAs merged into the weights, in order.
    single_file_config: pipeline folder or Hub id that describes a single-file checkpoint.
    base_quantization: "int8" or "nf4": the denoiser's linear layers, its other weights in
        base_dtype (None: the dtype of the rest).
    expert: of a model with two denoisers which is loaded: "both", "high" or "low" (noise).
    """

    model: str
    revision: str | None = None
    variant: str | None = None
    teacher_lora: tuple[str, ...] = ()
    single_file_config: str | None = None
    base_quantization: str = "none"
    base_dtype: torch.dtype | None = None
    expert: Expert = "both"

    def __post_init__(self) -> None:
        # A path means the same from every working directory, and never becomes a Hub id.
        object.__setattr__(self, "model", absolute(str(self.model)))
        if self.single_file_config is not None:
            object.__setattr__(self, "single_file_config", absolute(str(self.single_file_config)))
        object.__setattr__(self, "teacher_lora", tuple(self.teacher_lora))

    @classmethod
    def of(cls, model: str | Path | ModelSource, **options: Any) -> ModelSource:
        """The source itself, or that of a path or Hub id; options: other fields to set."""
        source = model if isinstance(model, ModelSource) else cls(str(model))
        return replace(source, **options) if options else source  # which knows its index

    @classmethod
    def of_run(cls, facts: Mapping[str, Any]) -> ModelSource:
        """The teacher that a run's record (run.json, distillation.json) names."""
        earlier = facts.get("train_config", {})
        merged = [lora_text(fact) for fact in facts.get("teacher_lora", ())]
        return cls(
            facts["model"],
            facts.get("revision"),
            facts.get("variant"),
            tuple(merged),
            # Earlier runs had it among their training options.
            facts.get("single_file_config", earlier.get("single_file_config")),
            expert=facts.get("expert", "both"),
        )

    def __str__(self) -> str:
        return " + ".join([self.model, *self.teacher_lora])

    @property
    def is_single_file(self) -> bool:
        """See `single_file.is_single_file`."""
        return is_single_file(self.model)

    @cached_property
    def described_at(self) -> str:
        """The folder or Hub id that holds its configurations. See `single_file.config_source`."""
        return config_source(self.model, self.single_file_config)

    @property
    def hub(self) -> dict[str, str]:
        """What the stock loaders are told beside it."""
        return {"revision": self.revision} if self.revision else {}

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json. Errors: ValueError for no Diffusers pipeline, or a broken file."""
        where = self.described_at
        folder = Path(where)
        check_place(where)
        if not folder.exists():
            entries: dict[str, Any] = DiffusionPipeline.load_config(where, **self.hub)
            check_index(entries, where)
            return entries
        file = folder / "model_index.json"
        read = read_json(file, ("_class_name",))
        if not isinstance(read.get("_class_name"), str):
            raise ValueError(f"{file}: expected an object with a string _class_name, got none.")
        check_index(read, file)
        return read

    @property
    def pipeline_class(self) -> str:
        """The name of its Diffusers pipeline class. Errors: see `index`."""
        return str(self.index["_class_name"])

    def check(self) -> None:
        """Errors: ValueError for options that are wrong whatever the weights."""
        check_quantization(self.base_quantization)
        for text in self.teacher_lora:
            parse_lora(text)

    def identity(self) -> Identity:
        """Of its files without the LoRAs; see loading/identity.py."""
        if not self.model:  # a pipeline in memory that came from nowhere
            return {}
        files = identity_of(self.model, self.revision, self.variant)
        if not self.is_single_file:
            return files
        described, complete = identity_of(self.described_at), is_whole(self.model)
        read = (name for name in described if not (complete and name.endswith(".safetensors")))
        return files | {f"single_file_config/{name}": described[name] for name in read}

    def facts(self) -> dict[str, Any]:
        """What identifies the teacher in a run's record. Errors: see `parse_lora`."""
        return {
            "model": self.model,
            "revision": self.revision,
            "variant": self.variant,
            "teacher_lora": lora_facts(self.teacher_lora),
            "single_file_config": self.single_file_config,
            "expert": self.expert,
        }
