"""The model card of a LoRA export: the code that loads it, and what belongs beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepdistill.export.card import (
    changed_data,
    load_arguments,
    lora_file,
    saving_code,
    teacher_loras,
)
from stepdistill.export.tool_notes import file_note, tool_notes
from stepdistill.loading.single_file import is_whole
from stepdistill.loading.source import ModelSource
from stepdistill.reporting.markdown import code as as_code
from stepdistill.reporting.markdown import plain
from stepdistill.reporting.values import counted


def base_code(record: Mapping[str, Any], pipeline: str) -> tuple[list[str], str]:
    """(classes to import, expression that loads the base)."""
    config = ModelSource.of_run(record["run"]).single_file_config
    base, parts = record["base_model"], load_arguments(record)
    if config is None:
        return ["DiffusionPipeline"], f"DiffusionPipeline.from_pretrained({base!r}{parts})"
    if is_whole(base):
        return [pipeline], f"{pipeline}.from_single_file({base!r}, config={config!r}{parts})"
    name, cls = record["denoiser"]
    return [pipeline, cls], (
        f"{pipeline}.from_pretrained(\n    {config!r}{parts},\n    {name}={cls}.from_single_file("
        f"{base!r}, config={config!r}, subfolder={name!r}),\n)"
    )


def lora_code(record: Mapping[str, Any], pipeline: str, scheduler: str, where: str) -> str:
    """Code that makes an image with an adapter that load_lora_weights reads."""
    loader, base = base_code(record, pipeline)
    lines = [*_imports(record, loader, scheduler), "", f"pipe = {base}"]
    beside = teacher_loras(record)
    for i, lora in enumerate(beside):
        lines.append(
            f"pipe.load_lora_weights({lora['source']!r}, weight_name={lora['weight_name']!r}, "
            f"adapter_name='teacher_{i}')"
        )
    lora = record["lora"]
    for component, file in lora.get("files", {"": lora["file"]}).items():  # earlier ones: one file
        second = ", load_into_transformer_2=True" * (component == "transformer_2")
        lines.append(
            f"pipe.load_lora_weights({where!r}, weight_name={file!r}, "
            f"adapter_name='student'{second})"
        )
    experts = record.get("experts") or {}
    if experts.get("boundary_ratio") != experts.get("trained_boundary"):
        lines.append(f"pipe.register_to_config(boundary_ratio={experts['boundary_ratio']})")
    if beside:
        names = [*(f"teacher_{i}" for i in range(len(beside))), "student"]
        lines.append(f"pipe.set_adapters({names}, {[*(x['scale'] for x in beside), 1.0]})")
    return "\n".join([*lines, *_last(record, scheduler, where)])


def peft_code(
    record: Mapping[str, Any], pipeline: str, scheduler: str, where: str, net_name: str
) -> str:
    """The same for pipelines without that loader, through PEFT."""
    loader, base = base_code(record, pipeline)
    lines = [
        *_imports(record, loader, scheduler),
        "from peft import PeftModel",
        "",
        f"pipe = {base}",
    ]
    for source in (*(lora["source"] for lora in teacher_loras(record)), where):
        lines.append(f"adapted = PeftModel.from_pretrained(pipe.{net_name}, {source!r})")
        lines.append(f"pipe.{net_name} = adapted.merge_and_unload()")
    return "\n".join([*lines, *_last(record, scheduler, where)])


def _imports(record: Mapping[str, Any], loaders: list[str], scheduler: str) -> list[str]:
    if not record.get("custom_code"):
        return [f"from diffusers import {', '.join([*loaders, scheduler])}"]
    return [
        f"from diffusers import {', '.join(loaders)}",
        "from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module",
    ]


def _last(record: Mapping[str, Any], scheduler: str, where: str) -> list[str]:
    code = record.get("custom_code")
    loading = [
        f"{scheduler} = get_class_from_dynamic_module(",
        f"    {where!r}, '{code}.py', 'scheduler', {scheduler!r}, trust_remote_code=True",
        ")",
    ]
    return [
        *(loading if code else ()),
        f"pipe.scheduler = {scheduler}.from_pretrained({where!r}, subfolder='scheduler')",
        *([record["net_code"]] if record.get("net_code") else ()),
        saving_code(record),
    ]


def write_lora_card(folder: Path, record: Mapping[str, Any], code: str | None, name: str) -> None:
    """README.md of an export called `name`.

    Args: code: Python that uses the file, or None where only other tools read it.
    """
    beside = "".join(
        f"- {as_code(lora_file(lora))} at scale {lora['scale']:g}\n"
        for lora in teacher_loras(record)
    )
    text = (
        "---\nlibrary_name: diffusers\ntags: [diffusers, lora, stepdistill, few-step]\n---\n\n"
        f"# {plain(name)}\n\nLoRA of {as_code(record['base_model'])} for "
        f"{counted(record['num_inference_steps'], 'step')} ({plain(record['method'])}), "
        f"format {record['lora']['format']}, {record['lora']['dtype']}.\n\n"
    )
    if beside:
        text += (
            "The teacher was the base with these LoRAs merged in. This file does not hold them: "
            f"load them beside it.\n\n{beside}\n"
        )
    if changed := changed_data(record["run"]):
        text += f"Its data changed while it was trained, at {changed}.\n\n"
    if code is not None:
        text += f"```python\n{code}\n```\n\n"
    text += file_note(record) + tool_notes(record)
    folder.joinpath("README.md").write_text(text)
