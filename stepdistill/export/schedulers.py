"""SamplerSpec -> the stock Diffusers scheduler that reproduces it from its saved config.

    VP    renoise  LCMScheduler            ode  DDIMScheduler (trailing)      tcd  TCDScheduler
    flow  renoise  FlowMatchLCMScheduler   ode  FlowMatchEulerDiscreteScheduler
    both  anchored, and Heun's rule: pipelines/rectified_flow_scheduler.py
                                           tcd  pipelines/tcd_flow_match_scheduler.py
    VE    renoise  CMStochasticIterativeScheduler (told 250 ln sigma)
                                           ode  EDMEulerScheduler (told ln(sigma) / 4)

Deterministic VP times that DDIM does not visit go to TCDScheduler with eta = 0, the same rule.
Where no config makes a scheduler visit the wanted times, the call needs them as an argument; they
then stand in `call` and on the model card.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)

from stepdistill.core.path import FlowPath, NoisePath, VEPath, VPPath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.export.flow_grid import flow_match_config, shift_of_grid
from stepdistill.families.schedule import sent_sigmas
from stepdistill.loading.project_code import part_class
from stepdistill.reporting.values import counted

# What a VP scheduler must keep of the teacher's: its noise table.
_TABLE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # what LCM, TCD and DDIM know
# c_skip of LCM at index n is .25 / ((scale n)^2 + .25): below 3e-9 from n = 1 on, so x0 is plain.
PLAIN_X0_SCALE = 1e4
# How classes of pipelines/rectified_flow_scheduler.py begin, by (kind, heun).
_RULES = {
    ("anchored", False): "Anchored",
    ("anchored", True): "AnchoredHeun",
    ("ode", True): "Heun",
}
ALL_ARGUMENTS = frozenset({"timesteps", "sigmas", "eta"})
# Read with "leading" spacing of DDIM alone. Stable Diffusion's pipelines call any other value
# outdated, and warn of it.
QUIET_OFFSET = {"steps_offset": 1}


@dataclass(frozen=True)
class StockSampler:
    """A scheduler and what a call must be given besides the number of steps and the guidance.

    visited: the network's times as the scheduler lists them, table indices or 1000 sigma.
    """

    scheduler: Any
    visited: tuple[float, ...]
    call: dict[str, Any] = field(default_factory=dict)


def stock_sampler(
    teacher_scheduler: Any,
    path: NoisePath,
    spec: SamplerSpec,
    flow_in_vp: bool = False,
    accepts: Collection[str] = ALL_ARGUMENTS,
    sends_sigmas: float = 0.0,
    scales_input: bool = True,
) -> StockSampler:
    """The stock sampler of `spec` for a student on `path`.

    Args:
        flow_in_vp: the student is a velocity network inside a pipeline made for VP schedulers.
        accepts: argument names of that pipeline's call.
        sends_sigmas: its call hands the scheduler linspace(1, 1/N, N), shifted by that, for N
            steps; 0 where it does not.
        scales_input: its loop calls the scheduler's scale_model_input.
    Errors: ValueError for a spec no stock scheduler samples in that pipeline.
    """
    if spec.tells_end:
        raise ValueError(
            "export: expected a student that is told its time alone, got one that is told where "
            "each step ends: no stock pipeline says that. Sample with stepdistill.sampling, or "
            "train with method_config.end_input: false (meanflow: r zero or phases)."
        )
    if _RULES.get((spec.kind, spec.heun)) and isinstance(path, VEPath):
        raise ValueError(
            f"export: expected a sampler that a scheduler has on a VE path, got kind {spec.kind}, "
            f"heun {spec.heun} in {spec.num_steps} steps. Export fewer (up to two the anchored is "
            "Euler's), or a run with method_config.sampler: euler and heun: false, which trains "
            "the same weights."
        )
    if isinstance(path, VPPath):
        return _vp(teacher_scheduler.config, path, spec, accepts)
    if isinstance(path, FlowPath):
        return _flow(path, spec, flow_in_vp, accepts, sends_sigmas, scales_input)
    if isinstance(path, VEPath):
        return _ve(teacher_scheduler, path, spec)
    raise ValueError(f"export: expected a VP, flow or VE student, got {type(path).__name__}.")


def _ours(spec: SamplerSpec, base: str) -> Any:
    """The class of pipelines/ that takes the spec's steps, None where a stock one does."""
    rule = _RULES.get((spec.kind, spec.heun))
    return rule and part_class("rectified_flow_scheduler", f"{rule}{base}Scheduler")


def _listed(times: Sequence[Any], spec: SamplerSpec) -> tuple[Any, ...]:
    """What the network is told: Heun's later times end one step, and begin the next."""
    return (times[0], *(t for t in times[1:] for _ in range(1 + spec.heun)))


# ------------------------------------------------------------------ VP tables
def _vp(config: Any, path: VPPath, spec: SamplerSpec, accepts: Collection[str]) -> StockSampler:
    times = torch.tensor(spec.times, dtype=torch.float64)
    indices = [round(n) for n in path.entry(path.snap(times)).tolist()]
    table = _table(config, path)
    if spec.kind == "renoise":
        scale = PLAIN_X0_SCALE if spec.boundary_scale is None else spec.boundary_scale
        return _subset(LCMScheduler, {**table, "timestep_scaling": scale}, indices, spec, accepts)
    if spec.boundary_scale is not None:
        raise ValueError(
            f"export: expected boundary_scale with kind renoise alone, got it with {spec.kind!r}. "
            "LCMScheduler is the one stock scheduler that blends."
        )
    trailing = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    trailing |= QUIET_OFFSET
    ours = _ours(spec, "DDIM")
    if ours is not None:
        made = ours(**table, **trailing)
        made.set_timesteps(len(indices))
        if made.timesteps.tolist() != list(_listed(indices, spec)):
            raise ValueError(
                f"export: expected trailing timesteps with {ours.__name__}, got {indices}."
            )
        return StockSampler(made, tuple(made.timesteps.tolist()))
    gamma = spec.gamma if spec.kind == "tcd" else 0.0
    if gamma == 0.0:
        made = DDIMScheduler(**table, **trailing)
        made.set_timesteps(len(indices))
        # DDIM steps by this stride, whatever it visits next: the two must agree.
        stride = path.num_steps // len(indices)
        if made.timesteps.tolist() == indices == list(range(path.num_steps - 1, -1, -stride)):
            return StockSampler(made, tuple(indices))
    if "eta" not in accepts:
        raise ValueError(
            f"export: expected DDIM's trailing timesteps with gamma 0 in a pipeline without `eta`, "
            f"got {indices} with gamma {gamma}. Use a uniform grid of steps that divide the table."
        )
    # Stock TCD ends at table index 0, not at clean data. An index 0 without noise, the rest
    # unchanged, makes its last step end at x0.
    table = {key: table[key] for key in ("num_train_timesteps", "prediction_type")}
    table["trained_betas"] = path_betas(path, clean_start=True)
    made = _subset(TCDScheduler, table, indices, spec, accepts)
    return StockSampler(made.scheduler, made.visited, {"eta": gamma, **made.call})


def _subset(
    cls: Any,
    options: dict[str, Any],
    indices: list[int],
    spec: SamplerSpec,
    accepts: Collection[str],
) -> StockSampler:
    """LCM or TCD on N steps of a solver grid, or on timesteps that the call gives."""
    total, plain = options["num_train_timesteps"], spec.boundary_scale is None
    options = {**options, "clip_sample": False, "set_alpha_to_one": True}
    for original in _original_steps(spec, total):
        made = cls(**options, **QUIET_OFFSET, original_inference_steps=original)
        made.set_timesteps(len(indices))
        if made.timesteps.tolist() == indices:
            return StockSampler(made, tuple(indices))
    if "timesteps" not in accepts and len(indices) == 1 and cls is LCMScheduler and plain:
        # Of one step "leading" spacing visits its offset. (Stable Diffusion's pipelines reset that
        # to 1, but they take timesteps.)
        del options["timestep_scaling"]
        made = DDIMScheduler(**options, timestep_spacing="leading", steps_offset=indices[0])
        return StockSampler(made, tuple(indices))
    if "timesteps" not in accepts:
        raise ValueError(
            f"export: expected timesteps that a saved {cls.__name__} visits, for this pipeline's "
            f"call takes none, got {indices}. Use a uniform grid of steps that divide the table."
        )
    # Every index is then on its grid.
    made = cls(**options, **QUIET_OFFSET, original_inference_steps=total)
    return StockSampler(made, tuple(indices), {"timesteps": indices})


def _original_steps(spec: SamplerSpec, num_steps: int) -> list[int]:
    """Solver grid sizes to try, the trained one first: it then serves all its step counts."""
    trained = len(spec.trained_times) if spec.trained_times else 50
    tried = [trained, spec.num_steps, 50, 40, 100, 200]
    return [k for k in dict.fromkeys(tried) if spec.num_steps <= k <= num_steps]


def path_betas(path: VPPath, clean_start: bool = False) -> list[float]:
    """The betas of a VP table. clean_start: index 0 without noise, all others as they were."""
    times = torch.arange(1, path.num_steps + 1, dtype=torch.float64) / path.num_steps
    abar = path.coeffs(times)[0] ** 2
    if clean_start:
        abar[0] = 1.0
    betas: list[float] = (1.0 - abar / torch.cat([abar.new_ones(1), abar[:-1]])).tolist()
    return betas


def _table(config: Any, path: VPPath) -> dict[str, Any]:
    """The teacher's noise table as scheduler options; spelt out where its name does not give it."""
    table = {key: config[key] for key in _TABLE if key in config}
    times = torch.arange(1, path.num_steps + 1, dtype=torch.float64) / path.num_steps
    if table.get("trained_betas") is not None or table.get("beta_schedule") in _BETA_SCHEDULES:
        alphas = DDIMScheduler(**table).alphas_cumprod.double().clamp_min(0.0).sqrt()
        if np.allclose(alphas, path.coeffs(times)[0], atol=1e-5):
            return table
    return {
        "num_train_timesteps": path.num_steps,
        "trained_betas": path_betas(path),
        "prediction_type": table.get("prediction_type", "epsilon"),
    }


# ---------------------------------------------------------------------- flow
def _flow(
    path: FlowPath,
    spec: SamplerSpec,
    flow_in_vp: bool,
    accepts: Collection[str],
    sends_sigmas: float,
    scales_input: bool,
) -> StockSampler:
    gamma = {"renoise": 1.0, "tcd": spec.gamma}.get(spec.kind, 0.0)
    if spec.boundary_scale is not None:
        raise ValueError(
            f"export: expected plain x0 on a flow path, got {spec}: no flow scheduler blends. "
            "Sample with stepdistill.sampling."
        )
    total, num = path.num_train_timesteps, spec.num_steps
    listed = _listed(spec.times, spec)
    visited = tuple(total * t for t in listed)
    cls: Any = FlowMatchLCMScheduler if gamma else FlowMatchEulerDiscreteScheduler
    ours = _ours(spec, "FlowMatch")
    cls = ours or cls
    config: dict[str, Any] = {"num_train_timesteps": total}
    if 0.0 < gamma < 1.0:
        cls, config = (
            part_class("tcd_flow_match_scheduler", "FlowMatchTCDScheduler"),
            {**config, "gamma": gamma},
        )
    if flow_in_vp:
        # Such a pipeline multiplies its first noise by scheduler.init_noise_sigma, which flow
        # schedulers lack; an entry of that name in the saved config answers for it.
        config["init_noise_sigma"] = 1.0
    if flow_in_vp and scales_input and "sigmas" not in accepts and ours is None:
        # The loop calls scale_model_input: one stock flow scheduler has that.
        if gamma:
            raise ValueError(
                "export: expected kind ode for a velocity student in this pipeline, got "
                f"{spec.kind}: its loop calls what {cls.__name__} lacks. Use setup: wrapped."
            )
        cls, grid = FlowMapEulerDiscreteScheduler, {"shift": shift_of_grid(spec.times)}
    elif sends_sigmas and np.allclose(
        spec.times, uniform_grid(num, shift_of_grid(spec.times)), atol=1e-9
    ):  # a uniform grid already: the shift alone maps it
        grid = {"shift": shift_of_grid(spec.times) / sends_sigmas}
    else:
        grid = flow_match_config(spec.times, sends_sigmas > 0)
    made = cls.from_config({**config, **grid})
    if sends_sigmas:
        made.set_timesteps(sigmas=sent_sigmas(num, sends_sigmas))
    else:
        made.set_timesteps(num)
    if np.allclose(made.sigmas[:-1], listed, atol=1e-6):
        return StockSampler(made, visited)
    if "sigmas" not in accepts:
        raise ValueError(
            f"export: expected a (shifted) uniform grid, for this pipeline's call takes no sigmas, "
            f"got {spec.times}."
        )
    # Given sigmas are shifted too: the saved shift must be 1, the trained sigmas are final.
    made = cls.from_config({**config, "shift": 1.0})
    return StockSampler(made, visited, {"sigmas": list(spec.times)})


# ------------------------------------------------------------------------ VE
def _ve(teacher: Any, path: VEPath, spec: SamplerSpec) -> StockSampler:
    """Karras grids of N times with sigma_min = 0, by the sigma_min that makes theirs the same.

    EDM's grid takes sigma_max^(1/rho) to sigma_min^(1/rho) in N - 1 steps: with t_N = 1/N the
    uniform ones. That of consistency models takes every (n/N)-th of n times: with 1/n likewise.
    """
    if spec.boundary_sigma is not None:
        return _consistency_model(teacher, path, spec, spec.boundary_sigma)
    num, config = spec.num_steps, teacher.config
    is_cm = isinstance(teacher, CMStochasticIterativeScheduler)
    gamma = {"ode": 0.0, "renoise": 1.0, "tcd": spec.gamma}[spec.kind] if num > 1 else float(is_cm)
    if gamma != float(is_cm) or spec.boundary_scale is not None:
        wanted = "kind renoise (its scheduler restarts)" if is_cm else "kind ode (Euler)"
        raise ValueError(
            f"export: expected {wanted} and plain x0 beside {type(teacher).__name__}, got {spec}. "
            "Sample with stepdistill.sampling."
        )
    shared = {name: config[name] for name in ("sigma_max", "sigma_data", "rho")}
    sigmas = path.coeffs(torch.tensor(spec.times))[1]
    if float(sigmas[-1]) < path.sigma_min:
        raise ValueError(
            f"export: expected no noise below sigma_min {path.sigma_min:g}, where the teacher was "
            f"never trained, got {float(sigmas[-1]):.1e} at the last of "
            f"{counted(num, 'step')}. Use fewer."
        )
    made: Any
    if is_cm:
        table = 120 // num * num  # a sigma_min whose square float32 holds
        made = CMStochasticIterativeScheduler(
            **shared,
            num_train_timesteps=table,
            # Rounded to float32: the scheduler takes a root of its own minus its square.
            sigma_min=float(np.float32(path.sigma_max * float(table) ** -path.rho)),
            clip_denoised=False,
        )
    else:
        first = config.sigma_min if num == 1 else path.sigma_max * spec.times[-1] ** path.rho
        kind = config.prediction_type
        made = EDMEulerScheduler(**shared, sigma_min=first, prediction_type=kind)
    made.set_timesteps(num)
    if not np.allclose(made.sigmas[:num], sigmas, rtol=1e-4):
        raise ValueError(
            f"export: expected the uniform grid of {num} times on a VE path, got {spec.times}."
        )
    return StockSampler(made, tuple(float(t) for t in made.timesteps))


def _consistency_model(
    teacher: Any, path: VEPath, spec: SamplerSpec, sigma_min: float
) -> StockSampler:
    """CD's own scheduler on the K + 1 Karras points of its grid, the last of them sigma_min."""
    config, times = teacher.config, torch.tensor(spec.times, dtype=torch.float64)
    if not isinstance(teacher, CMStochasticIterativeScheduler) or config.sigma_data != 0.5:
        raise ValueError(
            "export: expected a teacher beside CMStochasticIterativeScheduler with sigma_data 0.5, "
            f"got {config.sigma_data:g} beside {type(teacher).__name__}: no stock scheduler has "
            "the blend that was trained. Set boundary: none, or give the teacher that scheduler."
        )
    intervals = len(spec.trained_times or spec.times)
    low = float(path.time_of_sigma(torch.tensor(sigma_min, dtype=torch.float64)))
    # Index 0 is the noisiest, as the call's `timesteps` have it.
    indices = (intervals * (1.0 - times) / (1.0 - low)).round().long().flip(0).tolist()
    made = CMStochasticIterativeScheduler(
        **{name: config[name] for name in ("sigma_max", "sigma_data", "rho")},
        num_train_timesteps=intervals + 1,
        sigma_min=sigma_min,
        clip_denoised=False,
    )
    call: dict[str, Any] = {}
    made.set_timesteps(spec.num_steps)
    sigmas = path.coeffs(times)[1]
    if not np.allclose(made.sigmas[:-1], sigmas, rtol=1e-4):
        call = {"timesteps": indices}
        made.set_timesteps(**call)
    assert np.allclose(made.sigmas[:-1], sigmas, rtol=1e-4), "the grid is Karras's"
    return StockSampler(made, tuple(float(t) for t in made.timesteps), call)
