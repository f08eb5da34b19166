"""Write a LoRA student as pytorch_lora_weights.safetensors that stock Diffusers loads.

Pipelines without a LoRA loader (PixArt, DiT) get PEFT's own two files in its place.

Rank and alpha travel in the file's metadata: without it a loader takes alpha = rank, and an adapter
trained at another scale loses its strength silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_FILE
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from stepdistill.core.solvers import SamplerSpec
from stepdistill.export.card import call_code, load_arguments
from stepdistill.export.pipeline import RECORD, check_out_dir, describe, sampler_of
from stepdistill.models.family import Family
from stepdistill.models.rolebank import BASE, RoleBank

LORA_FILE = "pytorch_lora_weights.safetensors"


def export_lora(
    family: Family,
    bank: RoleBank,
    spec: SamplerSpec,
    out_dir: Path,
    facts: Mapping[str, Any],
    role: str = "student",
) -> Path:
    """Write the role's adapter, its scheduler's config and a card; returns the folder.

    Errors: ValueError for a full student.
    """
    pipeline_cls: Any = type(family.pipeline)
    if role in bank.nets:
        raise ValueError(
            "export: expected a LoRA student for format lora, got a full one. "
            "Export format pipeline."
        )
    check_out_dir(out_dir)
    sampler = sampler_of(family, bank[role].path, spec)
    out_dir.mkdir(parents=True, exist_ok=True)
    base: Any = bank.nets[BASE]
    state = get_peft_model_state_dict(base, adapter_name=role)
    config = base.peft_config[role]
    loads_lora = hasattr(pipeline_cls, "save_lora_weights")
    if loads_lora:
        pipeline_cls.save_lora_weights(
            out_dir,
            **{
                f"{family.net_name}_lora_layers": state,
                f"{family.net_name}_lora_adapter_metadata": config.to_dict(),
            },
            weight_name=LORA_FILE,
            safe_serialization=True,
        )
    else:
        config.save_pretrained(str(out_dir))
        named = {f"base_model.model.{name}": value.contiguous() for name, value in state.items()}
        save_file(named, out_dir / PEFT_FILE, metadata={"format": "pt"})
    sampler.scheduler.save_pretrained(out_dir / "scheduler")
    record = describe(family, spec, sampler, facts)
    (out_dir / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    _card(out_dir, record, type(sampler.scheduler).__name__, family.net_name, loads_lora)
    return out_dir


def _card(
    folder: Path, record: Mapping[str, Any], scheduler: str, net_name: str, loads_lora: bool
) -> None:
    name, base = folder.name, record["base_model"]
    load, extra = f"pipe.load_lora_weights({name!r})\n", ""
    if not loads_lora:
        load = (
            f"adapted = PeftModel.from_pretrained(pipe.{net_name}, {name!r})\n"
            f"pipe.{net_name} = adapted.merge_and_unload()\n"
        )
        extra = "from peft import PeftModel\n"
    folder.joinpath("README.md").write_text(
        "---\nlibrary_name: diffusers\ntags: [diffusers, lora, stepdistill, few-step]\n---\n\n"
        f"# {name}\n\nLoRA of `{base}` for {record['num_inference_steps']} steps "
        f"({record['method']}).\n\n```python\n"
        f"from diffusers import DiffusionPipeline, {scheduler}\n{extra}\n"
        f"pipe = DiffusionPipeline.from_pretrained({base!r}{load_arguments(record)})\n"
        f"{load}"
        f"pipe.scheduler = {scheduler}.from_pretrained({name!r}, subfolder='scheduler')\n"
        f"pipe({call_code(record)}).images[0].save('image.png')\n```\n"
    )
