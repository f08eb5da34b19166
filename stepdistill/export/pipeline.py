"""Write a distilled student as a stock Diffusers pipeline that needs no custom code.

The folder holds the pipeline, distillation.json (what it is, how to call it) and a model card. It
is written aside, loaded back by Diffusers, compared with the in-memory sampler, then renamed.
"""

# Shapes: B batch, C channels, *S spatial, H, W in px.

from __future__ import annotations

import copy
import importlib.metadata
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.core.path import FlowPath
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.export.card import write_card
from stepdistill.export.schedulers import StockSampler, stock_sampler
from stepdistill.export.weights import stock_net
from stepdistill.models.family import Family
from stepdistill.models.registry import load_family
from stepdistill.models.rolebank import RoleBank

RECORD = "distillation.json"
TOLERANCE = 1e-3  # images in [0, 1]; a wrong timestep or scheduler is orders above it


def export_pipeline(
    family: Family,
    bank: RoleBank,
    spec: SamplerSpec,
    out_dir: Path,
    facts: Mapping[str, Any],
    role: str = "student",
    verify: bool = True,
) -> Path:
    """Write the role's network as a pipeline folder; returns it.

    Args: facts: what the run was (model, method, step, ...), kept in distillation.json.
    Errors: ValueError for an out_dir with anything else in it; RuntimeError where the written
        pipeline does not make the in-memory sampler's image.
    """
    check_out_dir(out_dir)
    denoiser = bank[role]
    flow_in_vp = isinstance(denoiser.path, FlowPath) and not isinstance(family.path, FlowPath)
    sampler = stock_sampler(family.pipeline.scheduler, denoiser.path, spec, flow_in_vp)
    pipeline = copy.copy(family.pipeline)
    pipeline.register_modules(
        **{family.net_name: stock_net(bank, role), "scheduler": sampler.scheduler}
    )
    aside = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    pipeline.save_pretrained(aside, safe_serialization=True)
    record = describe(family, spec, sampler, facts)
    (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    write_card(aside, record, type(family.pipeline).__name__, out_dir.name)
    if verify:
        _verify(family, bank, role, spec, sampler, aside)
    if out_dir.exists():
        shutil.rmtree(out_dir)
    aside.replace(out_dir)
    return out_dir


def check_out_dir(out_dir: Path) -> None:
    """Errors: ValueError where out_dir holds anything but an earlier export."""
    if out_dir.exists() and any(out_dir.iterdir()) and not (out_dir / RECORD).is_file():
        raise ValueError(
            f"export: expected an empty folder or an earlier export, got {out_dir} with other "
            "files. Choose another folder."
        )


def describe(
    family: Family, spec: SamplerSpec, sampler: StockSampler, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of distillation.json."""
    guidance = spec.guidance if spec.w is None else spec.w + 1.0
    packages = ("torch", "diffusers", "transformers", "peft", "stepdistill")
    return {
        "base_model": facts.get("model"),
        "family": family.name,
        "method": facts.get("method"),
        "num_inference_steps": spec.num_steps,
        "guidance_scale": guidance,
        "guidance_embedded": spec.w is not None,
        "call": sampler.call,
        "kind": spec.kind,
        "times": list(spec.times),
        "trained_times": None if spec.trained_times is None else list(spec.trained_times),
        "visited_model_times": list(sampler.visited),
        "teacher_shift": family.shift,
        "run": dict(facts),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


@torch.no_grad()
def _verify(
    family: Family,
    bank: RoleBank,
    role: str,
    spec: SamplerSpec,
    sampler: StockSampler,
    folder: Path,
) -> None:
    """Errors: RuntimeError where the folder's image is not the in-memory sampler's."""
    net: Any = family.net
    stock = load_family(folder, torch_dtype=net.dtype)
    stock.pipeline.to(net.device)
    stock.pipeline.set_progress_bar_config(disable=True)
    if sampler.call.keys() & {"timesteps", "sigmas"}:
        _preset(stock.pipeline.scheduler, sampler.call)
    prompts = [0] if family.conditioning == "label" else ["a test"]
    guidance = spec.guidance if spec.w is None else spec.w + 1.0
    devices = [net.device] if net.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # The default generator serves the pipelines that pass theirs on and those that don't.
        torch.manual_seed(0)
        theirs = stock.stock_call(prompts, guidance, spec.num_steps, torch.default_generator)
        torch.manual_seed(0)
        ours = _in_memory(family, bank, role, spec, prompts)
    worst = float((ours - theirs.float().cpu()).abs().max())
    if worst > (TOLERANCE if sampler.exact else 20 * TOLERANCE):
        raise RuntimeError(
            f"export: expected the saved pipeline to make the in-memory sampler's image, got a "
            f"difference of {worst:.2e}. The unfinished export is kept in {folder}."
        )


def _in_memory(
    family: Family, bank: RoleBank, role: str, spec: SamplerSpec, prompts: list[Any]
) -> Tensor:
    """(B, C, H, W) in [0, 1], with noise from the default CPU generator in stock order."""
    device = next(family.net.parameters()).device
    shape = (len(prompts), *family.sample_shape())
    latents = sample_x0(
        bank[role],
        spec,
        torch.randn(shape).to(device),
        family.encode(prompts).to(device),
        family.null(len(prompts)).to(device) if spec.guidance != 1.0 else None,
        fresh_noise=lambda _step: torch.randn(shape).to(device),
    )
    return (family.images(latents).float().cpu() / 2 + 0.5).clamp(0, 1)


def _preset(scheduler: Any, call: Mapping[str, Any]) -> None:
    """Make the scheduler take the call's explicit times whatever it is asked for."""
    times = {key: call[key] for key in ("timesteps", "sigmas") if key in call}
    original = scheduler.set_timesteps

    def preset(*_args: Any, device: Any = None, **_kwargs: Any) -> None:
        original(device=device, **times)

    scheduler.set_timesteps = preset
