"""Write a LoRA student for stock Diffusers, or for other tools; read it back before it counts.

lora      pytorch_lora_weights.safetensors for load_lora_weights, rank and alpha in its metadata:
          without it a loader takes alpha = rank, and an adapter trained at another scale loses its
          strength silently. Pipelines without a LoRA loader (PixArt, DiT) get PEFT's two files.
kohya, comfyui   one file with those tools' keys: see lora_formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from stepdistill.core.solvers import SamplerSpec
from stepdistill.export.lora_card import lora_code, peft_code, write_lora_card
from stepdistill.export.lora_formats import (
    PEFT_FILE,
    PREFIX,
    Lora,
    adapters_of,
    check_format,
    check_lora,
    diffusers_reads,
    read_back,
    write_format,
)
from stepdistill.export.pipeline import RECORD, describe, sampler_of
from stepdistill.families.family import Family
from stepdistill.loading.original_layout import has_layout
from stepdistill.loading.project_code import put_code
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.folders import refuse_foreign, replacing
from stepdistill.testing.parity import Row, adapted

LORA_FILE = "pytorch_lora_weights.safetensors"
LORA_FORMATS = ("lora", *PREFIX)


def export_lora(
    family: Family,
    bank: RoleBank,
    spec: SamplerSpec,
    out_dir: Path,
    facts: Mapping[str, Any],
    role: str = "student",
    format: str = "lora",
    add: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Write the role's adapter, its scheduler's config and a card; returns the folder.

    Args: format: one of LORA_FORMATS; add: see export_pipeline.
    Errors: ValueError for a full student or a format that the family's network has no keys in;
        RuntimeError where the file, read back, does not hold the adapter.
    """
    if role in bank.nets:
        raise ValueError(
            f"export: expected a LoRA student for format {format}, got a full one. "
            "Export format pipeline."
        )
    if format in PREFIX:
        check_format(family, format)
    refuse_foreign(out_dir, "export")
    sampler = sampler_of(family, bank[role].path, spec)
    with replacing(out_dir, "export") as aside:
        aside.mkdir()
        # Other tools call a LoRA by its file name.
        own_name = f"{out_dir.resolve().name}.safetensors"
        file, adapters = _write(family, bank, role, aside, format, own_name)
        sampler.scheduler.save_pretrained(aside / "scheduler")
        # A student on a base of its own belongs to that one, not to the teacher.
        own = facts.get("student_base") or facts.get("model")
        record = describe(family, spec, sampler, {**facts, "model": own})
        record["lora"] = {"format": format, "file": file}
        record["custom_code"] = put_code(sampler.scheduler, aside / "scheduler")
        record["lora"]["read_back"] = check_lora(family, aside / file, format, adapters)
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        scheduler = type(sampler.scheduler).__name__
        text = _code(family, record, scheduler, out_dir.name)
        write_lora_card(aside, record, text, out_dir.name)
        add(aside)
    return out_dir


def lora_rows(family: Family) -> list[Row]:
    """(name, largest relative difference) of an adapter written in every format and read back."""
    forms = LORA_FORMATS if has_layout(family.net) else ("lora",)
    rows = []
    with adapted(family) as bank, TemporaryDirectory() as folder:
        for form in forms:
            out = Path(folder) / form
            out.mkdir()
            file, adapters = _write(family, bank, "student", out, form, "student.safetensors")
            found = read_back(family, out / file, form, adapters)
            rows += [(f"lora: {form}, read back by {name}", value) for name, value in found.items()]
    return rows


def _write(
    family: Family, bank: RoleBank, role: str, out_dir: Path, format: str, own_name: str
) -> tuple[str, dict[str, Lora]]:
    """(name of the weight file, adapters by stock name). Args: own_name: of a tool's file."""
    if format in PREFIX:
        return own_name, write_format(bank, role, format, out_dir / own_name)
    base: Any = bank.base_of(role)
    pipeline: Any = family.pipeline
    state = get_peft_model_state_dict(base, adapter_name=role)
    config = base.peft_config[role]
    if family.has_lora_loader():
        type(pipeline).save_lora_weights(
            out_dir,
            **{
                f"{family.net_name}_lora_layers": state,
                f"{family.net_name}_lora_adapter_metadata": config.to_dict(),
            },
            weight_name=LORA_FILE,
            safe_serialization=True,
        )
        return LORA_FILE, adapters_of(base, role)
    config.save_pretrained(str(out_dir))
    named = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
    save_file(named, out_dir / PEFT_FILE, metadata={"format": "pt"})
    return PEFT_FILE, adapters_of(base, role)


def _code(family: Family, record: Mapping[str, Any], scheduler: str, where: str) -> str | None:
    """Python that uses the file in folder `where`; None where Diffusers does not read it."""
    pipeline, told = type(family.pipeline).__name__, record["lora"]
    if told["file"] == PEFT_FILE:
        return peft_code(record, pipeline, scheduler, where, family.net_name)
    if told["format"] == "lora" or diffusers_reads(family.net, told["format"]):
        return lora_code(record, pipeline, scheduler, where)
    return None
