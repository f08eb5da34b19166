"""Write a distilled student as a stock Diffusers pipeline that needs no custom code.

The folder holds the pipeline, distillation.json (what it is, how to call it) and a model card. It
is written aside, loaded back by Diffusers, compared with the in-memory sampler, then renamed.
"""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepdistill.core.path import FlowPath, NoisePath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.export.card import write_card
from stepdistill.export.causal import as_played, causal_pipeline, causal_sampler
from stepdistill.export.defaults import settle
from stepdistill.export.experts import joined, settle_experts
from stepdistill.export.schedulers import StockSampler, stock_sampler
from stepdistill.export.tool_settings import tools_of
from stepdistill.export.verify import check_export
from stepdistill.export.weights import stock_net
from stepdistill.families.family import Family
from stepdistill.loading.project_code import put_code
from stepdistill.loading.quantization import is_quantized
from stepdistill.loading.quiet import without_bars
from stepdistill.reporting.bars import bar
from stepdistill.roles.rolebank import RoleBank
from stepdistill.storage.files import EXPORT_RECORD as RECORD
from stepdistill.storage.files import json_sha256
from stepdistill.storage.folders import refuse_foreign, replacing


def export_pipeline(
    family: Family,
    bank: RoleBank,
    spec: SamplerSpec,
    out_dir: Path,
    facts: Mapping[str, Any],
    role: str = "student",
    verify: bool = True,
    high_student: str | Path | None = None,
    add: Callable[[Path], object] = lambda folder: None,
    progress: bool = False,
) -> Path:
    """Write the role's network as a pipeline folder; returns it.

    Args: facts: what the run was (model, method, step, ...), kept in distillation.json; add:
        writes more files into the folder before it takes its place; progress: show a bar.
        high_student: the export of the other expert's run, beside the student of a low-noise one.
    Errors: ValueError for an out_dir with anything else in it; RuntimeError where the written
        pipeline does not make the in-memory sampler's image.
    """
    refuse_foreign(out_dir, "export")
    denoiser: Any = bank[role]
    if family.expert == "low":
        family, denoiser, net, spec = joined(family, bank, role, spec, high_student)
    else:
        net = stock_net(bank, role)
    sampler = sampler_of(family, denoiser.path, spec)
    if spec.chunk:
        pipeline = causal_pipeline(family, net, sampler, spec.chunk)
    else:
        pipeline = copy.copy(family.pipeline)
        net = family.net_for(net, sampler.scheduler)
        pipeline.register_modules(**family.parts_of(net), scheduler=sampler.scheduler)
    quantized = is_quantized(family.net)
    if quantized:
        denoiser = denoiser.on(net)  # what is written is the student on the base as it was
    like = net if quantized else family.net
    record = describe(family, spec, sampler, facts, denoiser.path)
    record["experts"] = settle_experts(family, pipeline, spec.times)
    pipeline, record["typed"] = settle(family, pipeline, record)
    done = bar(total=3, desc="export", leave=False, disable=not progress)  # write, verify, samples
    alone = without_bars("diffusers", "transformers")
    with done, alone, replacing(out_dir, "export") as aside:
        pipeline.save_pretrained(aside, safe_serialization=True)
        done.update()
        load_alike(aside)
        record["custom_code"] = put_code(sampler.scheduler, aside / "scheduler")
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        write_card(aside, record, type(pipeline).__name__, out_dir.name)
        if verify:
            player, rule = as_played(denoiser, spec, sampler) if spec.chunk else (denoiser, spec)
            check_export(aside, record, family, player, rule, like)
        done.update()
        add(aside)
        done.update()
    return out_dir


def load_alike(folder: Path) -> None:
    """Let a plain from_pretrained load all parts of a saved pipeline in one type, float32.

    Diffusers loads its parts so unless told otherwise, Transformers its encoders in the type that
    their config names: of a pipeline in bf16 the two do not fit together. torch_dtype goes on to
    load all parts in another.
    """
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if "transformers_version" in config:
            file.write_text(json.dumps(_in_float32(config), indent=2) + "\n", encoding="utf-8")


def _in_float32(config: Any) -> Any:
    if isinstance(config, dict):
        named = {"dtype", "torch_dtype"}
        return {
            key: "float32" if key in named and isinstance(value, str) else _in_float32(value)
            for key, value in config.items()
        }
    return config


def sampler_of(family: Family, path: NoisePath, spec: SamplerSpec) -> StockSampler:
    """The stock sampler of a student on `path` in the family's pipeline."""
    if spec.keeps_scheduler:  # its times are its own affair
        return StockSampler(family.pipeline.scheduler, ())
    if spec.chunk:
        return causal_sampler(family, path, spec)
    # A teacher that is itself such an export is known by the entry its scheduler was given.
    flow = isinstance(path, FlowPath)
    family.refuse_one_step(type(family.pipeline).__name__, flow, spec.num_steps)
    made_so = "init_noise_sigma" in family.pipeline.scheduler.config
    flow_in_vp = flow and (made_so or not isinstance(family.path, FlowPath))
    accepts = frozenset(inspect.signature(type(family.pipeline).__call__).parameters)
    if family.grid_argument in accepts:
        accepts |= {"sigmas"}
    if family.scales_input:  # the one flow scheduler that can do it takes no sigmas
        accepts -= {"sigmas"}
    sampler = stock_sampler(
        family.pipeline.scheduler,
        path,
        spec,
        flow_in_vp,
        accepts,
        family.sends_sigmas,
        family.scales_input,
    )
    call = {family.grid_argument if k == "sigmas" else k: v for k, v in sampler.call.items()}
    return replace(sampler, call=call)


def missing_parts(pipeline: Any) -> list[str]:
    """Required parts the pipeline does without (SD3's T5): a stock load must say so again."""
    return [
        name
        for name, part in pipeline.components.items()
        if part is None and name not in type(pipeline)._optional_components
    ]


def _first_argument(family: Family) -> str:
    """Of the pipeline's call, after self: Flux.2's begins with reference images."""
    return list(inspect.signature(type(family.pipeline).__call__).parameters)[1]


def size_call(family: Family, resolution: int | None) -> dict[str, Any]:
    """Height and width, px, where the student was trained at another size than the model's own."""
    taken = inspect.signature(type(family.pipeline).__call__).parameters
    shape = family.default_shape
    if resolution is None or family.sample_shape(resolution, resolution) == shape:
        return {}
    options = family.size_options(resolution, resolution)
    return {name: value for name, value in options.items() if name in taken}


def describe(
    family: Family,
    spec: SamplerSpec,
    sampler: StockSampler,
    facts: Mapping[str, Any],
    path: NoisePath,
) -> dict[str, Any]:
    """The content of distillation.json."""
    guidance = spec.guidance if spec.w is None else spec.w + 1.0
    resolution = facts.get("train_config", {}).get("resolution")
    size = size_call(family, resolution)
    packages = ("torch", "diffusers", "transformers", "peft", "stepdistill")
    return {
        "base_model": facts.get("model"),
        "family": family.name,
        "conditioning": family.conditioning,
        "denoiser": [family.net_name, type(family.first_net).__name__],
        "output": family.output,
        "reads": list(family.needs_images()),
        "image_argument": family.image_argument,
        "prompt_by_name": family.conditioning == "prompt" and _first_argument(family) != "prompt",
        "method": facts.get("method"),
        "num_inference_steps": spec.num_steps,
        "guidance_scale": family.stock_guidance(guidance) if family.has_null else None,
        "guidance_embedded": spec.w is not None,
        "guided": spec.guidance != 1.0,
        "call": {**size, **family.length_call, **family.guided_call(spec.guidance), **sampler.call},
        "load_without": missing_parts(family.pipeline),
        "kind": spec.kind,
        "heun": spec.heun,
        "times": None if spec.keeps_scheduler else list(spec.times),
        "expert": family.expert,
        "grid": list(spec.grid),
        "trained_times": None if spec.trained_times is None else list(spec.trained_times),
        "visited_model_times": list(sampler.visited),
        "teacher_shift": family.shift_at(resolution, resolution),
        "tools": tools_of(family, path, spec, sampler, resolution)
        if family.expert == "both" and not spec.chunk
        else None,
        "run": dict(facts),
        "run_sha256": json_sha256(dict(facts)),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }
