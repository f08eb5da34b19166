"""Load an export so that a call needs a prompt alone, whatever its class's defaults.

`DiffusionPipeline.from_pretrained` loads the same folder; where distillation.json lists `typed`
options it has to be told them at each call. This loader puts them into the call's defaults.
"""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
from huggingface_hub import hf_hub_download

from stepdistill.export.card import typed_options
from stepdistill.export.pipeline import RECORD
from stepdistill.families.family import Family
from stepdistill.loading.project_code import project_parts
from stepdistill.loading.source import ModelSource
from stepdistill.reporting.values import counted


def load_pipeline(model: str | Path, **kwargs: Any) -> Any:
    """The stock pipeline of an export (folder or Hub id), its call's defaults the student's own.

    Args: kwargs: for from_pretrained; revision also finds the record.
    Errors: ValueError where the folder is no pipeline export.
    """
    record = _record(model, kwargs.get("revision"))
    index = diffusers.DiffusionPipeline.load_config(str(model), revision=kwargs.get("revision"))
    stock = getattr(diffusers, index["_class_name"])
    cls = few_step_class(stock, typed_options(record), bool(record.get("prompt_by_name")))
    hub = {"revision": kwargs["revision"]} if "revision" in kwargs else {}
    parts = project_parts(model, index, **hub)
    options = {"use_safetensors": True, **dict.fromkeys(record["load_without"]), **parts, **kwargs}
    return cls.from_pretrained(str(model), **options)


def refuse_double_guidance(model: Any, guidance: float) -> None:
    """Errors: ValueError where `model` is an export with guidance folded in and guidance is not 1.

    Args: model: a pipeline folder, a Hub id (not looked up), a ModelSource or a loaded Family.
    """
    source, record = _export_of(model)
    if guidance == 1.0 or not record:
        return
    if not record["guided"] and not record["guidance_embedded"]:
        raise ValueError(
            f"guidance: expected 1 for {source}, a student with guidance folded in, got "
            f"{guidance}: it would count twice. Set method_config.guidance: 1 and, to halve "
            "steps alone, guidance_stage: false."
        )


def refuse_other_sampling(model: Any, num_steps: int, told_times: bool) -> None:
    """Warns where `model` is an export for another number of steps. Errors: ValueError where its
    own scheduler, without guidance, does not sample it: it is guided, or its call is told what
    the run is not.

    Args: model: see refuse_double_guidance. told_times: whether the run knows the times that the
        model's call is told.
    """
    source, record = _export_of(model)
    if not record:
        return
    known = {"timesteps", "sigmas"} if told_times else set()
    arguments = sorted(({"timesteps", "sigmas", "eta"} - known) & record["call"].keys())
    if record["guided"] or arguments:
        got = f"one whose call is told {arguments}" if arguments else "one that is guided"
        raise ValueError(
            f"model: expected a distilled pipeline that its scheduler samples by itself, without "
            f"guidance, got {source}, {got}. Say such times as --method_config.call_times, or "
            "export it at steps that need no such argument."
        )
    if record["num_inference_steps"] != num_steps:
        warnings.warn(
            f"num_steps {num_steps}: {source} was exported for "
            f"{counted(record['num_inference_steps'], 'step')}.",
            stacklevel=4,
        )


def _export_of(model: Any) -> tuple[str, dict[str, Any]]:
    """(where a model is from, its record; empty where that is no folder of an export)."""
    source = (
        model.pipeline.name_or_path if isinstance(model, Family) else ModelSource.of(model).model
    )
    file = Path(source or "") / RECORD
    return str(source), json.loads(file.read_text()) if file.is_file() else {}


def few_step_class(stock: Any, defaults: dict[str, Any], prompt_by_name: bool = False) -> Any:
    """A subclass of a stock pipeline class that differs in the defaults of its call alone.

    Its name is the stock one's, so that saving names the stock class.
    Args: prompt_by_name: the stock call begins with images; a first argument that is a string, or a
        list of strings, is taken as the prompt all the same.
    """
    signature = inspect.signature(stock.__call__)

    @functools.wraps(stock.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if prompt_by_name and args and "prompt" not in kwargs and _is_prompt(args[0]):
            args, kwargs = (None, *args[1:]), {**kwargs, "prompt": args[0]}
        given = signature.bind(self, *args, **kwargs).arguments
        rest = {name: value for name, value in defaults.items() if name not in given}
        return stock.__call__(self, *args, **kwargs, **rest)

    return type(stock.__name__, (stock,), {"__call__": call, "__doc__": stock.__doc__})


def _is_prompt(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(isinstance(text, str) for text in texts)


def _record(model: str | Path, revision: str | None) -> dict[str, Any]:
    file = Path(model) / RECORD
    if not Path(model).exists():
        file = Path(hf_hub_download(str(model), RECORD, revision=revision))
    elif not (file.is_file() and (Path(model) / "model_index.json").is_file()):
        raise ValueError(
            f"load_pipeline: expected a pipeline export with {RECORD}, got {str(model)!r}. "
            "Load other pipelines with DiffusionPipeline.from_pretrained."
        )
    record: dict[str, Any] = json.loads(file.read_text())
    return record
