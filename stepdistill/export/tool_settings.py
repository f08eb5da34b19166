"""Which sampler, scheduler and numbers make ComfyUI and A1111 sample a student as it was trained.

Both know the time by sigma: of a VP path noise over signal, of a flow path t. Their scheduler
"simple" takes every (T / N)-th of T sigmas from the noisiest on; "normal", "sgm_uniform", "beta"
and "ddim_uniform" visit other times. ComfyUI's ManualSigmas takes any list.
Sources: ComfyUI 0.8 comfy/samplers.py, model_sampling.py, k_diffusion/sampling.py; A1111 1.10.1
modules/sd_schedulers.py, sd_samplers_lcm.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stepdistill.core.path import FlowPath, NoisePath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.export.flow_grid import shift_of_grid
from stepdistill.export.schedulers import StockSampler
from stepdistill.export.tool_rules import ToolRules, tool_rules
from stepdistill.families.family import Family
from stepdistill.reporting.values import counted

TOLERANCE = 5e-4  # in t, half a training step
_TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SIZES = {"vp": 1000, "flow": 1000, "flux": 10_000}
_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v_prediction", "sample": "x0"}
_ZERO_SNR_SIGMA = (1 / 4.8973451890853435e-08 - 1) ** 0.5  # where ComfyUI's rescaled table ends
_BLEND_GONE = 100.0  # LCM's share of its input is below 3e-5 where scale * index is above


def simple_times(num_steps: int, total: int = 1000, shift: float = 1.0) -> list[float]:
    """The t that scheduler "simple" visits in a flow table of `total` entries shifted by k."""
    listed = [1.0 - int(i * total / num_steps) / total for i in range(num_steps)]
    return [shift * t / (1.0 + (shift - 1.0) * t) for t in listed]


def simple_indices(num_steps: int, total: int = 1000, every: int = 1) -> list[int]:
    """The table indices that it visits in a VP table, of which a sampler keeps one in `every`."""
    count = total // every
    return [total - 1 - every * int(i * count / num_steps) for i in range(num_steps)]


def listed(sigmas: Sequence[float]) -> str:
    """As ManualSigmas reads them: no exponents, 0 at the end."""
    return ", ".join(f"{s:.6f}".rstrip("0").rstrip(".") for s in (*sigmas, 0.0))


IMAGE_NODES = {
    "FluxKontextPipeline": "ReferenceLatent",
    "QwenImageEditPipeline": "TextEncodeQwenImageEdit",
    "QwenImageEditPlusPipeline": "TextEncodeQwenImageEditPlus",
    "StableDiffusionInstructPix2PixPipeline": "InstructPixToPixConditioning",
    "StableDiffusionInpaintPipeline": "InpaintModelConditioning",
    "StableDiffusionXLInpaintPipeline": "InpaintModelConditioning",
    "FluxFillPipeline": "InpaintModelConditioning",
}


def tools_of(
    family: Family, path: NoisePath, spec: SamplerSpec, sampler: StockSampler, px: int | None
) -> dict[str, Any] | None:
    """`tool_settings` of a student and what a workflow needs; None where no tool has names for it.

    size: (height, width), px; frames of a video; reads_clip_vision: of a first frame; image_node:
    what takes an image to edit or to repaint.
    """
    rules = tool_rules(family.net, family.from_first_frame())
    if rules is None:
        return None
    pipeline, shape, video = family.pipeline, family.sample_shape(px, px), family.output == "frames"
    factor = pipeline.vae_scale_factor_spatial if video else pipeline.vae_scale_factor
    settings = tool_settings(rules, path, spec, sampler.scheduler.config, family.net_name == "unet")
    if "comfyui" in settings and family.config.get("guidance_embeds"):
        # Told a node's absence, ComfyUI takes 3.5.
        settings["comfyui"]["flux_guidance"] = spec.guidance if spec.w is None else spec.w + 1.0
        settings["comfyui"]["cfg"] = 1.0
    return {
        **settings,
        "size": [int(side * factor) for side in shape[-2:]],
        "frames": (shape[1] - 1) * pipeline.vae_scale_factor_temporal + 1 if video else None,
        "image_node": IMAGE_NODES.get(type(pipeline).__name__),
        "reads_clip_vision": family.from_first_frame() and family.config.image_dim is not None,
    }


def tool_settings(
    rules: ToolRules, path: NoisePath, spec: SamplerSpec, scheduler: Mapping[str, Any], sd: bool
) -> dict[str, Any]:
    """What to set: {"comfyui": {...}, "a1111": {...} or None}, or {"why": text} where nothing fits.

    comfyui: sampler, scheduler (None: ManualSigmas alone), steps, cfg, sigmas, shift (None for VP),
    node and its widgets, None where ComfyUI's own schedule serves. a1111: sampler, scheduler, and
    the model times that it visits by them.
    Args: scheduler: configuration of the exported scheduler. sd: the network is a UNet.
    """
    flow = isinstance(path, FlowPath)
    sampler, why = _sampler(spec, flow), None
    if spec.keeps_scheduler and spec.trained_times is not None:
        number = counted(spec.num_steps, "step")
        why = f"It is sampled as the model that it was tuned from is, in {number}."
    elif spec.keeps_scheduler:
        why = (
            "It is sampled as its teacher is: any sampler and scheduler, without guidance (CFG 1)."
        )
    elif sampler is None:
        why = f"No sampler of ComfyUI or A1111 takes the steps of kind {spec.kind}."
    elif sd and spec.w is not None:
        why = "Neither ComfyUI nor A1111 tells a UNet the guidance."
    elif spec.boundary_scale is not None and (
        spec.boundary_scale * float(path.model_time(torch.tensor(spec.times[-1]))) < _BLEND_GONE
    ):
        why = "No sampler of ComfyUI or A1111 blends a step's result with its input as this does."
    elif not flow and any(scheduler.get(k) != v for k, v in _TABLE.items()):
        why = "ComfyUI and A1111 have one noise table (scaled_linear, 0.00085 to 0.012), not this."
    if why is not None or sampler is None:
        return {"why": why}
    settings = {"sampler": sampler, "steps": spec.num_steps, "cfg": spec.guidance}
    make = _flow if flow else _vp
    return {
        "comfyui": {**settings, **make(rules, path, spec, scheduler, sd)},
        "a1111": _a1111(rules, path, spec, sampler),
    }


def _sampler(spec: SamplerSpec, flow: bool) -> str | None:
    """ComfyUI's name of the spec's steps; one step is Euler's whatever the kind."""
    if spec.boundary_sigma is not None:
        return None
    if spec.heun:
        return "heun" if flow and spec.kind == "ode" else None
    noise = {"renoise": 1.0, "tcd": spec.gamma}.get(spec.kind, 0.0)
    if spec.num_steps == 1 or (noise == 0.0 and (spec.kind != "anchored" or spec.num_steps == 2)):
        return "euler"
    return "lcm" if noise == 1.0 else None


def _flow(
    rules: ToolRules, path: NoisePath, spec: SamplerSpec, scheduler: Mapping[str, Any], sd: bool
) -> dict[str, Any]:
    total, num = _SIZES["flow" if sd else rules.table], spec.num_steps
    stock_shift = 1.0 if sd else (math.exp(rules.shift) if rules.table == "flux" else rules.shift)
    wanted = shift_of_grid(spec.times) if num > 1 else stock_shift
    if rules.table == "flux":  # widgets have two digits and no sign
        wanted = math.exp(max(0.0, round(math.log(wanted), 2)))
    else:
        wanted = max(0.01, round(wanted, 2))

    def fits(shift: float) -> bool:
        visited = simple_times(num, total, shift)
        return all(abs(a - b) <= TOLERANCE for a, b in zip(visited, spec.times, strict=True))

    shift = stock_shift if fits(stock_shift) else wanted
    simple, node = fits(shift), None
    if sd or (simple and shift != stock_shift):
        k = shift if simple else 1.0
        name = "ModelSamplingSD3" if sd else rules.shift_node
        node = [name, [k]]
        if rules.table == "flux":  # the same shift at every size
            node = [name, [round(math.log(k), 2), round(math.log(k), 2), 1024, 1024]]
    return {
        "scheduler": "simple" if simple else None,
        "shift": round(shift, 4) if simple else None,
        "node": node,
        "sigmas": listed(spec.times),
    }


def _vp(
    rules: ToolRules, path: NoisePath, spec: SamplerSpec, scheduler: Mapping[str, Any], sd: bool
) -> dict[str, Any]:
    times = path.snap(torch.tensor(spec.times, dtype=torch.float64))
    alpha, sigma = path.coeffs(times)
    indices = [round(n) for n in path.model_time(times).tolist()]
    zero_snr = bool(scheduler.get("rescale_betas_zero_snr"))
    prediction = _PREDICTIONS[scheduler.get("prediction_type", "epsilon")]
    states_prediction = prediction != "eps" or zero_snr
    return {
        "scheduler": "simple" if indices == simple_indices(spec.num_steps) else None,
        "shift": None,
        "node": ["ModelSamplingDiscrete", [prediction, zero_snr]] if states_prediction else None,
        "sigmas": listed((sigma / alpha).clamp_max(_ZERO_SNR_SIGMA).tolist()),
    }


def _a1111(
    rules: ToolRules, path: NoisePath, spec: SamplerSpec, sampler: str
) -> dict[str, Any] | None:
    """A1111's names, and the model times that it visits by them; None where it has none."""
    if not rules.a1111 or isinstance(path, FlowPath) != (rules.table == "flow"):
        return None
    num = spec.num_steps
    if isinstance(path, FlowPath):  # its LCM knows VP tables alone, its shift is fixed
        visits = [1000.0 * t for t in simple_times(num, shift=rules.shift)]
        if sampler == "lcm":
            return None
    else:  # its LCM keeps one time in twenty
        visits = [float(n) for n in simple_indices(num, every=20 if sampler == "lcm" else 1)]
    names = {"lcm": "LCM", "euler": "Euler", "heun": "Heun"}
    return {"sampler": names[sampler], "scheduler": "Simple", "visits": visits}
