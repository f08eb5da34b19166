"""Write several LoRA students on one base as a routed pipeline; read it back before it counts.

The folder is the base's own pipeline with pipelines/multi_student.py in it, which Diffusers runs
with trust_remote_code=True, and students/: all adapters in float32, and the router.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from stepdistill.core.solvers import SamplerSpec
from stepdistill.export.card import call_options, write_card
from stepdistill.export.lora_formats import adapters_of, folded
from stepdistill.export.pipeline import RECORD, describe, load_alike, sampler_of
from stepdistill.export.verify import check_images, pipeline_image, sampler_image
from stepdistill.export.weights import stock_net
from stepdistill.families.family import Family
from stepdistill.loading.project_code import project_module
from stepdistill.loading.quiet import without_bars
from stepdistill.loading.safe_files import load_stock
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.files import read_json
from stepdistill.storage.folders import refuse_foreign, replacing

MODULE = "multi_student"
ROUTER = ("centroids", "offsets", "bounds")
Student = tuple[Family, RoleBank, SamplerSpec, Mapping[str, Any], str]


def export_students(
    students: Iterable[Student],
    router: Mapping[str, Any],
    prompts: list[Any],
    out_dir: Path,
) -> Path:
    """Write K students, of which one is held at a time, as a routed pipeline; returns its folder.

    Args: students: (family, bank, spec, facts of the run, role) of each in turn; router: ROUTER's
        values; prompts: a prompt or label of each student's share, which are compared.
    Errors: ValueError for an out_dir with anything else in it; RuntimeError where the written
        pipeline does not make a student's in-memory image.
    """
    refuse_foreign(out_dir, "export")
    code, count = project_module(MODULE), len(prompts)
    adapters, images = [], []
    for number, (family, bank, spec, facts, role) in enumerate(students):
        base: Any = bank.base_of(role)
        adapters.append(folded(adapters_of(base, role), torch.float32))
        if number == 0:
            sampler = sampler_of(family, bank[role].path, spec)
            record = describe(family, spec, sampler, facts, bank[role].path)
            net: Any = stock_net(bank, role, adapter=False)
            first = family
        denoiser = bank[role]
        images.append(sampler_image(family, denoiser, spec, record, prompts[number], base.device))
    down, up = (
        {n: torch.stack([_half(a[n], i) for a in adapters]) for n in adapters[0]} for i in (0, 1)
    )
    shapes = {name: [list(down[name].shape[1:]), list(up[name].shape[1:])] for name in down}
    call = {**first.call_extras, **call_options(record)}
    parts = code.StudentAdapters(first.net_name, shapes, count, **router, call=call)
    for name in down:
        key = name.replace(".", "/")
        parts.down[key].copy_(down[name])
        parts.up[key].copy_(up[name])
    pipeline = copy.copy(first.pipeline)
    pipeline.register_modules(**{first.net_name: net, "scheduler": sampler.scheduler})
    record |= {"typed": {}, "custom_code": MODULE, "students": {"count": count, "by": _by(router)}}
    with without_bars("diffusers", "transformers"), replacing(out_dir, "export") as aside:
        code.routed(pipeline, parts).save_pretrained(aside, safe_serialization=True)
        load_alike(aside)
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        write_card(aside, record, type(pipeline).__name__, out_dir.name)
        saved = load_students(aside, record["load_without"], dtype=net.dtype).to(net.device)
        for number, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
            chosen = saved.students_of([prompt])
            if chosen != [number]:
                raise RuntimeError(
                    f"export: expected student {number} for a prompt of its share, got "
                    f"{chosen[0]}. The encoder rounds otherwise than at the split."
                )
            check_images(image, pipeline_image(saved, first, record, prompt), net.dtype, aside)
    return out_dir


def _half(lora: Any, which: int) -> Tensor:
    half: Tensor = (lora.down, lora.up)[which]
    return half


def _by(router: Mapping[str, Any]) -> str:
    """What students are chosen by, in words."""
    if router["bounds"] is not None:
        return f"class label, from {', '.join(map(str, router['bounds']))} on"
    return "the prompt's text" if router["centroids"] is not None else "nothing, as there is one"


def holds_students(folder: str | Path) -> bool:
    """Whether it is such an export."""
    return (Path(folder) / MODULE).with_suffix(".py").is_file()


def load_students(folder: str | Path, load_without: Iterable[str] = (), **options: Any) -> Any:
    """The routed pipeline of such an export, by this project's own code: none of the folder runs.

    Args: load_without: parts that the base does without; options: for from_pretrained.
    Errors: ValueError for a broken folder, or one with other code in it.
    """
    root, code = Path(folder).resolve(), project_module(MODULE)
    index = read_json(root / "model_index.json", ("stock_class", "students"))
    plain = {**index, "_class_name": index["stock_class"]}
    del plain["stock_class"], plain["students"]
    with TemporaryDirectory() as stock:  # the same parts without the router
        for part in root.iterdir():
            if part.is_dir() and part.name != "students":
                os.symlink(part, Path(stock) / part.name)
        (Path(stock) / "model_index.json").write_text(json.dumps(plain))
        pipeline = load_stock(stock, plain, **dict.fromkeys(load_without), **options)
    dtype = {name: options[name] for name in ("dtype",) if name in options}
    parts = code.StudentAdapters.from_pretrained(str(root), subfolder="students", **dtype)
    return code.routed(pipeline, parts)
