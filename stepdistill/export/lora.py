"""Write a LoRA student as pytorch_lora_weights.safetensors that stock Diffusers loads.

Rank and alpha travel in the file's metadata: without it a loader takes alpha = rank, and an adapter
trained at another scale loses its strength silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft.utils import get_peft_model_state_dict

from stepdistill.core.path import FlowPath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.export.card import call_arguments, load_arguments
from stepdistill.export.pipeline import RECORD, call_arguments_of, check_out_dir, describe
from stepdistill.export.schedulers import stock_sampler
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

    Errors: ValueError for a full student, or a pipeline class that loads no LoRA.
    """
    pipeline_cls = type(family.pipeline)
    if role in bank.nets:
        raise ValueError(
            "export: expected a LoRA student for format lora, got a full one. "
            "Export format pipeline."
        )
    if not hasattr(pipeline_cls, "save_lora_weights"):
        raise ValueError(
            "export: expected a pipeline class that loads LoRA files, got "
            f"{pipeline_cls.__name__}. Export format pipeline: the adapter is merged into it."
        )
    check_out_dir(out_dir)
    base: Any = bank.nets[BASE]
    state = get_peft_model_state_dict(base, adapter_name=role)
    config = base.peft_config[role].to_dict()
    path = bank[role].path
    flow_in_vp = isinstance(path, FlowPath) and not isinstance(family.path, FlowPath)
    sampler = stock_sampler(
        family.pipeline.scheduler, path, spec, flow_in_vp, call_arguments_of(family)
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    pipeline_cls.save_lora_weights(
        out_dir,
        **{
            f"{family.net_name}_lora_layers": state,
            f"{family.net_name}_lora_adapter_metadata": config,
        },
        weight_name=LORA_FILE,
        safe_serialization=True,
    )
    sampler.scheduler.save_pretrained(out_dir / "scheduler")
    record = describe(family, spec, sampler, facts)
    (out_dir / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    _card(out_dir, record, type(sampler.scheduler).__name__)
    return out_dir


def _card(folder: Path, record: Mapping[str, Any], scheduler: str) -> None:
    name, base = folder.name, record["base_model"]
    folder.joinpath("README.md").write_text(
        "---\nlibrary_name: diffusers\ntags: [diffusers, lora, stepdistill, few-step]\n---\n\n"
        f"# {name}\n\nLoRA of `{base}` for {record['num_inference_steps']} steps "
        f"({record['method']}).\n\n```python\n"
        f"from diffusers import DiffusionPipeline, {scheduler}\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({base!r}{load_arguments(record)})\n"
        f"pipe.load_lora_weights({name!r})\n"
        f"pipe.scheduler = {scheduler}.from_pretrained({name!r}, subfolder='scheduler')\n"
        f'pipe("a prompt", {call_arguments(record)}).images[0].save("image.png")\n```\n'
    )
