"""Write a LoRA student for stock Diffusers, or for other tools; read it back before it counts.

lora      pytorch_lora_weights.safetensors for load_lora_weights. Its alpha is the rank, which
          loaders that read no metadata take it for (ComfyUI): an adapter trained at another scale
          loses none of its strength. Pipelines without a LoRA loader (PixArt, DiT) get PEFT's two
          files.
kohya, comfyui   one file with those tools' keys: see lora_formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from stepdistill.core.solvers import SamplerSpec
from stepdistill.export.adapter_files import adapter_config
from stepdistill.export.comfyui_workflow import WORKFLOW, workflow
from stepdistill.export.experts import (
    expert_at,
    expert_facts,
    expert_name,
    expert_part,
    mark,
    trained_boundary,
)
from stepdistill.export.lora_card import lora_code, peft_code, write_lora_card
from stepdistill.export.lora_formats import (
    DTYPES,
    LORA_FILE,
    PEFT_FILE,
    PREFIX,
    Lora,
    adapters_of,
    check_format,
    check_lora,
    folded,
    read_back,
    tensors_of,
)
from stepdistill.export.pipeline import RECORD, describe, sampler_of
from stepdistill.export.tool_rules import kohya_headers, modelspec, readers, tool_rules
from stepdistill.families.family import Family
from stepdistill.loading.project_code import put_code
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.folders import refuse_foreign, replacing
from stepdistill.testing.parity import Row, adapted

LORA_FORMATS = ("lora", *PREFIX)


def export_lora(
    family: Family,
    bank: RoleBank,
    spec: SamplerSpec,
    out_dir: Path,
    facts: Mapping[str, Any],
    role: str = "student",
    format: str = "lora",
    dtype: str = "bfloat16",
    add: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Write the role's adapter, its scheduler's config and a card; returns the folder.

    Beside a file that ComfyUI reads lies a workflow for it, workflow.json.
    Args: format: one of LORA_FORMATS. dtype: of the file, one of DTYPES. add: see
        export_pipeline.
    Errors: ValueError for a full student, a format that the family's network has no keys in or a
        dtype; RuntimeError where the file, read back, does not hold the adapter in that dtype.
    """
    if role in bank.nets:
        raise ValueError(
            f"export: expected a LoRA student for format {format}, got a full one. "
            "Export format pipeline."
        )
    if dtype not in DTYPES:
        raise ValueError(f"export: expected a dtype of {DTYPES}, got {dtype!r}.")
    if format in PREFIX:
        check_format(family, format)
    refuse_foreign(out_dir, "export")
    path, spec = bank[role].path, spec.whole  # a file is used beside the other expert's
    sampler = sampler_of(family, path, spec)
    # A student on a base of its own belongs to that one, not to the teacher.
    student_model = facts.get("student_base") or facts.get("model")
    record = describe(family, spec, sampler, {**facts, "model": student_model}, path)
    record["net_code"] = family.net_code(sampler.scheduler)
    base: Any = bank.base_of(role)
    rules, name = tool_rules(family.net, family.from_first_frame()), out_dir.resolve().name
    headers = modelspec(rules, record, name) if rules is not None and record["tools"] else {}
    with replacing(out_dir, "export") as aside:
        aside.mkdir()
        # Other tools call a LoRA by its file name.
        own_name = f"{name}.safetensors"
        files, read = _files(family, base, role, aside, format, dtype, headers, own_name)
        sampler.scheduler.save_pretrained(aside / "scheduler")
        record["custom_code"] = put_code(sampler.scheduler, aside / "scheduler")
        record["experts"] = expert_facts(family, spec.times)
        record["lora"] = {"format": format, "file": next(iter(files.values())), "dtype": dtype}
        record["lora"] |= {"files": files, "read_back": read, "readers": readers(rules, format)}
        settled = "comfyui" in (record["tools"] or {})
        if rules is not None and settled and "ComfyUI" in record["lora"]["readers"]:
            opened = json.dumps(workflow(rules, record), indent=1)
            (aside / WORKFLOW).write_text(opened + "\n")
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        scheduler = type(sampler.scheduler).__name__
        text = _code(family, record, scheduler, out_dir.name)
        write_lora_card(aside, record, text, out_dir.name)
        add(aside)
    return out_dir


def lora_rows(family: Family) -> list[Row]:
    """(name, largest relative difference) of an adapter written in every format and read back."""
    rows = []
    with adapted(family) as bank, TemporaryDirectory() as folder:
        base: Any = bank.base_of("student")
        for form in family.lora_formats:
            out = Path(folder) / form
            out.mkdir()
            _, gaps = _files(
                family, base, "student", out, form, "float32", {}, "student.safetensors", read_back
            )
            rows += [(f"lora: {form}, read back by {name}", value) for name, value in gaps.items()]
    return rows


def _files(
    family: Family,
    base: Any,
    role: str,
    out_dir: Path,
    format: str,
    dtype: str,
    headers: Mapping[str, str],
    own_name: str,
    compare: Callable[..., dict[str, float]] = check_lora,
) -> tuple[dict[str, str], dict[str, float]]:
    """(component -> name of its file, what `check_lora` finds of all): two of two experts, each
    named and marked after its own."""
    files, read = {}, dict[str, float]()
    nets = family.parts_of(base)
    for component, net in nets.items():
        adapters = folded(adapters_of(net, role), getattr(torch, dtype))
        parts = (base.peft_config[role], adapters, out_dir, format, headers, own_name)
        file, component = _write(family, *parts), expert_part(family, component)
        if (expert := expert_at(family, component)) is not None:
            made, file = out_dir / file, expert_name(file, expert)
            mark(made.rename(out_dir / file), expert, trained_boundary(family))
        files[component] = file
        gaps = compare(family, out_dir / file, format, adapters, component)
        for reader, gap in gaps.items():
            read[reader] = max(gap, read.get(reader, 0.0))
    return files, read


def _write(
    family: Family,
    config: LoraConfig,
    adapters: Mapping[str, Lora],
    out_dir: Path,
    format: str,
    headers: Mapping[str, str],
    own_name: str,
) -> str:
    """The name of the weight file.

    Args: adapters: see `folded`; headers, own_name: of other tools' files.
    """
    net = family.first_net
    if format in PREFIX:
        metadata = {"format": "pt", **headers}
        if format == "kohya":
            metadata |= kohya_headers(adapters)
        save_file(tensors_of(adapters, net, format), out_dir / own_name, metadata=metadata)
        return own_name
    state = {}
    for name, lora in adapters.items():
        state[f"{name}.lora_A.weight"] = lora.down.contiguous()
        state[f"{name}.lora_B.weight"] = lora.up.contiguous()
    lora_config = adapter_config(config.to_dict(), adapters)
    if family.has_lora_loader():
        type(family.pipeline).save_lora_weights(
            out_dir,
            **{
                f"{family.net_name}_lora_layers": state,
                f"{family.net_name}_lora_adapter_metadata": lora_config,
            },
            weight_name=LORA_FILE,
            safe_serialization=True,
        )
        return LORA_FILE
    type(config)(**lora_config).save_pretrained(str(out_dir))
    named = {f"base_model.model.{name}": value for name, value in state.items()}
    save_file(named, out_dir / PEFT_FILE, metadata={"format": "pt"})
    return PEFT_FILE


def _code(family: Family, record: Mapping[str, Any], scheduler: str, where: str) -> str | None:
    """Python that uses the file in folder `where`; None where Diffusers does not read it."""
    pipeline, lora = type(family.pipeline).__name__, record["lora"]
    if lora["file"] == PEFT_FILE:
        return peft_code(record, pipeline, scheduler, where, family.net_name)
    if "diffusers" in lora["read_back"]:
        return lora_code(record, pipeline, scheduler, where)
    return None
