"""Does a written pipeline, loaded by stock Diffusers, make the in-memory sampler's image?"""

# Shapes: B batch, C channels, *S spatial, H, W in px.

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser, is_guided
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.export.card import call_options, typed_options
from stepdistill.families.family import Family
from stepdistill.families.registry import load_family
from stepdistill.roles.role_denoiser import RoleDenoiser

# Images in [0, 1]: float32 leaves 1e-5; a wrong time, guidance or scheduler is orders above it.
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 5e-2  # half precision rounds merged adapters and every activation


@torch.no_grad()
def check_export(
    folder: Path,
    record: Mapping[str, Any],
    family: Family,
    denoiser: Denoiser,
    spec: SamplerSpec,
    net: Any,
) -> float:
    """The largest image difference in [0, 1] between the saved pipeline and `denoiser`.

    Args: net: a network in the dtype and on the device that the two are compared in.
    Errors: RuntimeError where it is above what the dtype explains.
    """
    stock = load_family(folder, torch_dtype=net.dtype).pipeline.to(net.device)
    stock.set_progress_bar_config(disable=True)
    prompt: Any = "a test" if family.conditioning == "prompt" else 0
    names = {"prompt": "prompt", "label": "class_labels"}
    subject = {names[family.conditioning]: [prompt]} if family.conditioning in names else {}
    size = {n: v for n, v in record["call"].items() if n in ("height", "width")}
    options = typed_options(record)
    if family.reads_image:  # its frame is of the model's own size
        options, size = {n: v for n, v in options.items() if n not in size}, {}
    devices = [net.device] if net.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # The default generator serves the pipelines that pass theirs on and those that don't.
        torch.manual_seed(0)
        result = stock(
            **subject,
            **{**family.call_extras, **options},
            generator=torch.default_generator,
            output_type="pt",
        )
        theirs = family.images_in(result)
        torch.manual_seed(0)
        if spec.keeps_scheduler:
            call = {**subject, **family.call_extras, **call_options(record), **size}
            ours = _in_stock_loop(family, denoiser, call)
        else:
            ours = _in_memory(family, denoiser, spec, prompt, size, net.device)
    worst = float((ours - theirs.float().cpu()).abs().max())
    if not worst <= TOLERANCE.get(net.dtype, HALF_TOLERANCE):
        raise RuntimeError(
            f"export: expected the saved pipeline to make the in-memory sampler's image, got a "
            f"difference of {worst:.2e}. The unfinished export is kept in {folder}."
        )
    return worst


def _in_stock_loop(family: Family, denoiser: Denoiser, call: Mapping[str, Any]) -> Tensor:
    """(1, C, H, W) in [0, 1] of the teacher's own pipeline around the student, nothing saved."""
    assert isinstance(denoiser, RoleDenoiser)
    with denoiser.in_pipeline() as pipeline:
        pipeline.set_progress_bar_config(disable=True)
        result = pipeline(**call, generator=torch.default_generator, output_type="pt")
    return family.images_in(result).float().cpu()


def _in_memory(
    family: Family,
    denoiser: Denoiser,
    spec: SamplerSpec,
    prompt: Any,
    size: Mapping[str, int],
    device: torch.device,
) -> Tensor:
    """(1, C, H, W) in [0, 1], with noise from the default CPU generator in stock order."""
    shape = (1, *family.sample_shape(**size))
    packed = family.pack(torch.zeros(shape)).shape  # a stock scheduler draws in this layout

    def fresh_noise(_step: int) -> Tensor:
        return family.unpack(torch.randn(packed), shape[1:]).to(device)

    latents = sample_x0(
        denoiser,
        spec,
        torch.randn(shape).to(device),
        family.encode([prompt]).to(device),
        family.null(1).to(device) if is_guided(spec.guidance) else None,
        fresh_noise=fresh_noise,
    )
    return (family.images(latents).float().cpu() / 2 + 0.5).clamp(0, 1)
