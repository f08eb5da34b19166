"""Does a written pipeline, loaded by stock Diffusers, make the in-memory sampler's image?"""

# Shapes: B batch, C channels, *S spatial, H, W in px.

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser, is_guided
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.types import Cond
from stepdistill.export.card import call_options, typed_options
from stepdistill.families.family import Family
from stepdistill.families.registry import load_family
from stepdistill.loading.safe_files import load_stock
from stepdistill.loading.source import ModelSource
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
    if spec.chunk:  # a class that no family serves as a teacher
        stock = load_stock(folder, ModelSource.of(folder).index, torch_dtype=net.dtype)
    else:
        stock = load_family(folder, torch_dtype=net.dtype).pipeline
    stock.to(net.device)
    prompt: Any = "a test" if family.conditioning == "prompt" else 0
    ours = sampler_image(family, denoiser, spec, record, prompt, net.device)
    theirs = pipeline_image(stock, family, record, prompt)
    return check_images(ours, theirs, net.dtype, folder)


@torch.no_grad()
def pipeline_image(stock: Any, family: Family, record: Mapping[str, Any], prompt: Any) -> Tensor:
    """(1, C, H, W) in [0, 1] of a pipeline called as the record says, noise of seed 0."""
    stock.set_progress_bar_config(disable=True)
    subject, options, _ = _call(family, record, prompt)
    with _seeded(stock.device), family.encodings(stock):
        # The default generator serves the pipelines that pass theirs on and those that don't.
        result = stock(
            **subject,
            **{**family.call_extras, **options},
            generator=torch.default_generator,
            output_type="pt",
        )
    return family.images_in(result).float().cpu()


@torch.no_grad()
def sampler_image(
    family: Family,
    denoiser: Denoiser,
    spec: SamplerSpec,
    record: Mapping[str, Any],
    prompt: Any,
    device: torch.device,
) -> Tensor:
    """The same of the in-memory sampler."""
    subject, _, size = _call(family, record, prompt)
    with _seeded(device):
        if spec.keeps_scheduler:
            call = {**subject, **family.call_extras, **call_options(record), **size}
            return _in_stock_loop(family, denoiser, call)
        return _in_memory(family, denoiser, spec, prompt, size, device)


def check_images(ours: Tensor, theirs: Tensor, dtype: torch.dtype, folder: Path) -> float:
    """Their largest difference. Errors: RuntimeError where it is above what the dtype explains."""
    worst = float((ours - theirs).abs().max())
    if not worst <= TOLERANCE.get(dtype, HALF_TOLERANCE):
        raise RuntimeError(
            f"export: expected the saved pipeline to make the in-memory sampler's image, got a "
            f"difference of {worst:.2e}. The unfinished export is kept in {folder}."
        )
    return worst


@contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Within: default generators of seed 0, which then are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _call(
    family: Family, record: Mapping[str, Any], prompt: Any
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(subject, options to type, size) of a call for one prompt or label."""
    names = {"prompt": "prompt", "label": "class_labels"}
    subject = {names[family.conditioning]: [prompt]} if family.conditioning in names else {}
    size = {n: v for n, v in record["call"].items() if n in ("height", "width")}
    options = typed_options(record)
    if family.from_first_frame():  # that is of the model's own size
        options, size = {n: v for n, v in options.items() if n not in size}, {}
    return subject, options, size


def _in_stock_loop(family: Family, denoiser: Denoiser, call: Mapping[str, Any]) -> Tensor:
    """(1, C, H, W) in [0, 1] of the teacher's own pipeline around the student, nothing saved."""
    assert isinstance(denoiser, RoleDenoiser)
    with denoiser.in_pipeline() as pipeline, family.encodings(pipeline):
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

    def condition() -> Cond:
        family.drawn_from = torch.default_generator
        try:
            return family.encode_at([prompt], shape[1:]).to(device)
        finally:
            family.drawn_from = None

    drawn: dict[str, Any] = {}
    for kind in (*family.call_draws, "images"):
        if kind == "images" and kind not in drawn:
            drawn[kind] = condition()
        elif kind == "noise":
            drawn[kind] = fresh_noise(0) if family.packed_noise else torch.randn(shape).to(device)
        elif kind == "unread":
            torch.randn(shape)
    cond, first = drawn["images"], drawn["noise"]
    null = family.null_for(cond) if is_guided(spec.guidance) else None
    latents = sample_x0(denoiser, spec, first, cond, null, fresh_noise=fresh_noise)
    return (family.images(latents).float().cpu() / 2 + 0.5).clamp(0, 1)
