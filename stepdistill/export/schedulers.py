"""SamplerSpec -> the stock Diffusers scheduler that reproduces it from its saved config.

    VP    renoise  LCMScheduler            ode  DDIMScheduler (trailing)      tcd  TCDScheduler
    flow  renoise  FlowMatchLCMScheduler   ode  FlowMatchEulerDiscreteScheduler

Where no config makes a scheduler visit the wanted times, the call needs them as an argument; they
then stand in `call` and on the model card.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)

from stepdistill.core.path import FlowPath, NoisePath, VPPath
from stepdistill.core.solvers import SamplerSpec

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
# c_skip of LCM at index n is .25 / ((scale n)^2 + .25): below 3e-9 from n = 1 on, so x0 is plain.
PLAIN_X0_SCALE = 1e4


@dataclass(frozen=True)
class StockSampler:
    """A scheduler and what a call must be given besides the number of steps and the guidance.

    visited: the network's times as the scheduler lists them, table indices or 1000 sigma.
    exact: False where the stock scheduler rounds times (raw velocity students in a VP pipeline).
    """

    scheduler: Any
    visited: tuple[float, ...]
    call: dict[str, Any] = field(default_factory=dict)
    exact: bool = True


def stock_sampler(
    teacher_scheduler: Any, path: NoisePath, spec: SamplerSpec, flow_in_vp: bool = False
) -> StockSampler:
    """The stock sampler of `spec` for a student on `path`.

    Args: flow_in_vp: the student is a velocity network inside a pipeline made for VP schedulers.
    Errors: ValueError for a spec no stock scheduler samples.
    """
    if flow_in_vp:
        return _velocity_in_vp(spec)
    if isinstance(path, VPPath):
        return _vp(teacher_scheduler.config, path, spec)
    if isinstance(path, FlowPath):
        return _flow(path, spec)
    raise ValueError(
        f"export: expected a VP or flow student, got {type(path).__name__}. VE students have no "
        "stock few-step scheduler; sample them with stepdistill.sampling."
    )


# ------------------------------------------------------------------------ VP
def _vp(config: Any, path: VPPath, spec: SamplerSpec) -> StockSampler:
    table = {key: config[key] for key in _TABLE if config.get(key) is not None}
    grid = torch.tensor(spec.times, dtype=torch.float64)
    indices = [round(n) for n in path.model_time(grid).tolist()]
    num = spec.num_steps
    if spec.kind == "ode" and num > 1:
        made = DDIMScheduler(
            **table, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
        made.set_timesteps(num)
        if made.timesteps.tolist() != indices:
            raise ValueError(
                f"export: expected a deterministic student on DDIM's trailing timesteps "
                f"{made.timesteps.tolist()}, got {indices}. Use a uniform grid of {num} steps."
            )
        return StockSampler(made, tuple(indices))
    cls = TCDScheduler if spec.kind == "tcd" else LCMScheduler
    scale = PLAIN_X0_SCALE if spec.boundary_scale is None else spec.boundary_scale
    call: dict[str, Any] = {"eta": spec.gamma} if spec.kind == "tcd" else {}
    for original in _original_steps(spec, path.num_steps):
        made = cls(
            **table,
            original_inference_steps=original,
            timestep_scaling=scale,
            clip_sample=False,
            set_alpha_to_one=True,
        )
        made.set_timesteps(num)
        if made.timesteps.tolist() == indices:
            return StockSampler(made, tuple(indices), call)
    return StockSampler(made, tuple(indices), {**call, "timesteps": indices})


def _original_steps(spec: SamplerSpec, num_steps: int) -> list[int]:
    """Solver grid sizes to try, the trained one first: it then serves all its step counts."""
    trained = len(spec.trained_times) if spec.trained_times else 50
    tried = [trained, spec.num_steps, 50, 40, 100, 200]
    return [k for k in dict.fromkeys(tried) if spec.num_steps <= k <= num_steps]


# ---------------------------------------------------------------------- flow
def _flow(path: FlowPath, spec: SamplerSpec) -> StockSampler:
    cls = FlowMatchEulerDiscreteScheduler if spec.kind == "ode" else FlowMatchLCMScheduler
    if spec.kind == "tcd":
        raise ValueError(
            "export: expected kind ode or renoise on a flow path, got tcd: no stock flow scheduler "
            "takes its step. Sample with stepdistill.sampling."
        )
    total, num = path.num_train_timesteps, spec.num_steps
    visited = tuple(total * t for t in spec.times)
    # The default list runs from 1 to 1/1000 and wastes its last call. shift_terminal stretches
    # it to end at 1/N: exactly the uniform grid, from the saved config alone.
    options = {"shift_terminal": spec.times[-1]} if num > 1 else {}
    made = cls(num_train_timesteps=total, shift=1.0, **options)
    made.set_timesteps(num)
    if np.allclose(made.sigmas[:-1], spec.times, atol=1e-6):
        return StockSampler(made, visited)
    # Given sigmas are shifted too: the saved shift must be 1, the trained sigmas are final.
    made = cls(num_train_timesteps=total, shift=1.0)
    return StockSampler(made, visited, {"sigmas": list(spec.times)})


def _velocity_in_vp(spec: SamplerSpec) -> StockSampler:
    """DPM-Solver of order 1 on flow sigmas is Euler; it starts at .999 and rounds model times."""
    made = DPMSolverMultistepScheduler(
        use_flow_sigmas=True,
        flow_shift=1.0,
        prediction_type="flow_prediction",
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="zero",
    )
    made.set_timesteps(spec.num_steps)
    if spec.kind != "ode" or not np.allclose(made.sigmas[:-1], spec.times, atol=2e-3):
        raise ValueError(
            f"export: expected a deterministic uniform grid for a raw velocity student, got "
            f"{spec.kind!r} on {spec.times}. Use setup: wrapped."
        )
    return StockSampler(made, tuple(float(t) for t in made.timesteps), exact=False)
