"""A whole pipeline from its configuration files, on the meta device: shapes without weights.

A folder (or a bundled description) names the parts and their configurations; every network is the
stock class built from them. Where a folder holds no tokenizer files, a small tokenizer of the same
class stands in: prompts are padded to the same length, and no text is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from diffusers.models.modeling_utils import no_init_weights
from torch import nn
from transformers import CLIPImageProcessor

from stepdistill.config.planned import bundled, description, require_known
from stepdistill.families.experts import PARTS, one_expert
from stepdistill.families.family import Family
from stepdistill.families.registry import family_for
from stepdistill.loading.project_code import part_class
from stepdistill.loading.source import Expert, ModelSource
from stepdistill.storage.files import read_json
from stepdistill.testing import tiny_parts

# Tokenizer classes by the start of their names, and what stands in for one without its files.
_STAND_INS: dict[str, Callable[[], Any]] = {
    "Qwen2VL": lambda: tiny_parts.qwen_processor(tiny_parts.qwen_tokenizer(vision=True), False),
    "CLIP": lambda: tiny_parts.clip_tokenizer(77),
    "T5": lambda: tiny_parts.t5(8)[0],
    "Qwen2": lambda: tiny_parts.qwen(8)[0],
    "Gemma": lambda: tiny_parts.gemma(8)[0],
}


def describe(model: str) -> dict[str, Any]:
    """What `planned.description` gives.

    Args: model: a bundled name, or a pipeline folder (weights are not read and may be absent).
    Errors: ValueError for anything else, for broken JSON, and for an index that names code which
        is not a library's.
    """
    if model in bundled():
        return description(model)
    require_known("plan", model)
    folder = Path(model)
    index = ModelSource(model).index
    parts: dict[str, Any] = {}
    options = {}
    for name, entry in index.items():
        if name.startswith("_"):
            continue
        if not isinstance(entry, list):
            options[name] = entry
        elif entry[1] is None:
            parts[name] = None
        else:
            parts[name] = {"class": ".".join(entry), **_part_config(folder / name)}
    return {"pipeline": index["_class_name"], "options": options, "parts": parts}


def _part_config(folder: Path) -> dict[str, Any]:
    for file in ("config.json", "scheduler_config.json"):
        if (folder / file).is_file():
            return {"config": read_json(folder / file)}
    return {"folder": str(folder)}


def blueprint(model: str, dtype: torch.dtype, expert: Expert = "both") -> Family:
    """The family of a model whose parts have shapes and a dtype, but no numbers.

    The dtype is that of `training.step.place`: autoencoders stay float32.

    Args: expert: see ModelSource.
    Errors: ValueError for an unknown model, or a part that no configuration describes.
    """
    described = describe(model)
    cls = family_for(described["pipeline"])
    options = dict(described["options"])
    cls.nets_in({**options, **_entries(described["parts"])})
    left_out, owned = one_expert(expert, options.get("boundary_ratio"), described["pipeline"])
    parts: dict[str, Any] = {
        name: None if name == left_out else _build(name, part, dtype)
        for name, part in described["parts"].items()
    }
    if left_out is not None:
        options["boundary_ratio"] = None
        if left_out == cls.net_name:
            parts[cls.net_name], parts[PARTS["low"]] = parts[PARTS["low"]], None
    module = import_module("diffusers")
    pipeline_class: type[DiffusionPipeline] = getattr(module, described["pipeline"])
    if "folder" not in (described["parts"].get("processor") or {"folder": ""}):
        ids = tiny_parts.vision_ids(parts["processor"].tokenizer)  # as the stand-in has them
        parts["text_encoder"].config.update(ids)
    with torch.device("meta"):  # some make a part of their own (SD3's, of a ControlNet)
        pipeline = pipeline_class(**parts, **options)
    family = cls(pipeline)
    family.owned = owned
    return family


def _entries(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Parts as a model_index.json has them."""
    return {
        name: (None, None) if part is None else part["class"].split(".", 1)
        for name, part in parts.items()
    }


def _build(name: str, part: Mapping[str, Any] | None, dtype: torch.dtype) -> Any:
    if part is None or name in ("safety_checker", "feature_extractor"):
        return None
    library, _, class_name = part["class"].partition(".")
    if (
        class_name == "CLIPImageProcessor" and "folder" not in part
    ):  # without files: those of the published CLIPs
        return CLIPImageProcessor(**part.get("config", {}))
    if "Tokenizer" in class_name or "Processor" in class_name:
        return _tokenizer(class_name, part)
    cls = part_class(library, class_name)
    if "Scheduler" in class_name:
        return cls.from_config(part["config"])
    with torch.device("meta"), no_init_weights():
        if issubclass(cls, ConfigMixin):
            net: nn.Module = cls.from_config(part["config"])
        else:
            net = cls(cls.config_class.from_dict(dict(part["config"])))
    for param in net.parameters():
        if param.is_floating_point() and not class_name.startswith("Autoencoder"):
            param.data = param.data.to(dtype)
    return net.eval()


def _tokenizer(class_name: str, part: Mapping[str, Any]) -> Any:
    folder = Path(part["folder"]) if "folder" in part else None
    if folder is not None and folder.is_dir() and any(folder.iterdir()):
        return getattr(import_module("transformers"), class_name).from_pretrained(str(folder))
    for start, make in _STAND_INS.items():
        if class_name.startswith(start):
            made = make()
            tokenizer = getattr(made, "tokenizer", made)  # a processor has one
            length = part.get("config", {}).get("model_max_length", tokenizer.model_max_length)
            tokenizer.model_max_length = length
            return made
    raise ValueError(
        f"plan: expected tokenizer files or a class of {sorted(_STAND_INS)}, got {class_name}. "
        "Save the tokenizer beside the configurations."
    )
