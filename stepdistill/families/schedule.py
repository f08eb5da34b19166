"""Stock schedulers read as noise paths: table, prediction type and resolution shift."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
)

from stepdistill.core.path import (
    FlowPath,
    NoisePath,
    PredictionType,
    TrigPath,
    VEPath,
    VPPath,
)
from stepdistill.core.solvers import SamplerKind, SamplerSpec
from stepdistill.core.times import shift_times


def dynamic_shift(config: Any, num_tokens: int) -> float:
    """Resolution shift of a flow scheduler that shifts by the number of image tokens.

    mu is linear in the tokens between (base_image_seq_len, base_shift) and (max_image_seq_len,
    max_shift), as in the stock pipelines' calculate_shift.
    """
    span = config.max_image_seq_len - config.base_image_seq_len
    slope = (config.max_shift - config.base_shift) / span
    return shift_of_mu(config, config.base_shift + slope * (num_tokens - config.base_image_seq_len))


def empirical_shift(config: Any, num_tokens: int, num_steps: int) -> float:
    """Shift that the stock call of Flux.2 makes for that many image tokens and steps."""
    # Here, because the module loads text encoders that other families have no use for.
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    return shift_of_mu(config, float(compute_empirical_mu(num_tokens, num_steps)))


def shift_of_mu(config: Any, mu: float) -> float:
    """exp(mu), or mu itself where time_shift_type is linear."""
    return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu


def read_schedule(scheduler: Any) -> tuple[NoisePath, PredictionType, float]:
    """(path, prediction type, shift) that a stock scheduler's config describes.

    A dynamic shift is read at the config's largest image, which is the model's own size.

    Errors: ValueError for a scheduler or prediction type that has no path here, and for eps
    prediction with zero terminal SNR, where x0 is undefined at t = 1.
    """
    config = scheduler.config
    kinds: dict[str, PredictionType] = {
        "epsilon": "eps",
        "v_prediction": "v",
        "sample": "x0",
        "flow_prediction": "flow",
    }
    flow = ("FlowMatch", "FlowMap")
    matches = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)  # pipelines/ has such
    if matches or type(scheduler).__name__.startswith(flow) or config.get("use_flow_sigmas"):
        shift = config.get("shift", config.get("flow_shift", 1.0))
        if config.get("use_dynamic_shifting"):
            shift = dynamic_shift(config, config.max_image_seq_len)
        if not 0 < shift < 1000:
            raise ValueError(
                f"scheduler: expected a shift between 0 and 1000, got {shift:g}. Look at shift, "
                "base_shift and max_shift."
            )
        return FlowPath(config.num_train_timesteps), "flow", float(shift)
    if type(scheduler).__name__.startswith(("EDM", "CMStochastic")):
        scale = 0.25 if type(scheduler).__name__.startswith("EDM") else 250.0
        return VEPath(config.sigma_max, config.rho, config.sigma_min, scale), "x0", 1.0
    name = config.get("prediction_type", "epsilon")
    if type(scheduler).__name__.startswith("CosineDPM"):
        if name != "v_prediction" or config.sigma_data != 1.0:
            raise ValueError(
                "scheduler: expected a CosineDPMSolverMultistepScheduler with v_prediction and "
                f"sigma_data 1, as Stable Audio's, got {name} and {config.sigma_data:g}."
            )
        return TrigPath(config.sigma_max), "v", 1.0
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if name not in kinds or alphas is None:
        raise ValueError(
            f"scheduler {type(scheduler).__name__}: expected a VP table or flow matching with "
            f"prediction_type in {sorted(kinds)}, got prediction_type {name!r}. "
            "Save the pipeline with a scheduler that states them."
        )
    if not (alphas.ndim == 1 and bool(((alphas >= 0) & (alphas <= 1)).all())):  # NaN is neither
        raise ValueError(
            f"scheduler {type(scheduler).__name__}: expected a table of alphas_cumprod in [0, 1], "
            "got other values. Look at beta_start, beta_end and trained_betas."
        )
    # Euler, EulerA and UniPC end such a table at 2^-24 in place of 0, which may be above the entry
    # before it.
    ends_at_zero = config.get("rescale_betas_zero_snr", False)
    if ends_at_zero and bool(alphas[-1] > alphas[-2]):
        alphas = torch.cat([alphas[:-1], alphas.new_zeros(1)])
    path = VPPath(alphas)
    if kinds[name] == "eps" and (ends_at_zero or float(path.coeffs(torch.ones(1))[0]) < 1e-6):
        raise ValueError(
            "scheduler: expected v_prediction with zero terminal SNR, got epsilon: one step from "
            "pure noise would divide by alpha = 0. Turn rescale_betas_zero_snr off."
        )
    return path, kinds[name], 1.0


def visited_times(scheduler: Any, path: NoisePath) -> tuple[float, ...]:
    """Descending times, each once, of the network's calls that a scheduler has been set to."""
    visited = torch.unique(scheduler.timesteps.double().cpu())
    times: list[float] = path.time_of(visited).clamp_max(1.0).flip(0).tolist()
    return tuple(times)


def sent_sigmas(num_steps: int, shift: float) -> list[float]:
    """linspace(1, 1/N, N), shifted: what some stock calls hand their scheduler."""
    uniform = torch.from_numpy(np.linspace(1.0, 1.0 / num_steps, num_steps))
    sigmas: list[float] = shift_times(uniform, shift).tolist()
    return sigmas


def own_sampler(
    scheduler: Any, path: NoisePath, sends_sigmas: float, num_steps: int, shift: float
) -> SamplerSpec:
    """The sampler that a stock scheduler is in num_steps steps of its pipeline's call.

    Its times are the scheduler's. In memory a scheduler that restarts from x0 (LCM) does so; one of
    another order, or with noise of its own (Euler ancestral), takes the deterministic steps.
    Args: sends_sigmas: see Family. shift: of a scheduler that the call tells one.
    Errors: ValueError where the scheduler can't take so many steps.
    """
    config, made = scheduler.config, type(scheduler).from_config(scheduler.config)
    call: dict[str, Any] = {"num_inference_steps": num_steps}
    if sends_sigmas:
        call = {"sigmas": sent_sigmas(num_steps, sends_sigmas)}
    if config.get("use_dynamic_shifting"):
        exponential = config.get("time_shift_type", "exponential") == "exponential"
        call["mu"] = math.log(shift) if exponential else shift
    try:
        made.set_timesteps(**call)
    except Exception as err:  # whatever a stock class raises at a count that it can't take
        raise ValueError(
            f"num_steps: expected a number that {type(made).__name__} takes, got {num_steps}: "
            f"{' '.join(str(err).split())}"
        ) from err
    times = visited_times(made, path)
    restarts = isinstance(
        made, LCMScheduler | FlowMatchLCMScheduler | CMStochasticIterativeScheduler
    )
    scale = config.timestep_scaling if isinstance(made, LCMScheduler) else None
    kind: SamplerKind = "renoise" if restarts else "ode"
    return SamplerSpec(times, kind, times, boundary_scale=scale, keeps_scheduler=True)


def parity_scheduler(family: Any) -> Any:
    """The stock scheduler that takes the deterministic first-order step of our solver."""
    stock: Any = family.pipeline.scheduler
    config = stock.config
    if isinstance(stock, FlowMatchEulerDiscreteScheduler):
        # One step under shift_terminal (Qwen-Image) divides by zero: no call here needs it.
        return FlowMatchEulerDiscreteScheduler.from_config(config, shift_terminal=None)
    if isinstance(family.path, VEPath):
        if not isinstance(stock, CMStochasticIterativeScheduler):
            return EDMEulerScheduler.from_config(config)
        # Without fresh noise, and with EDM's own scalings: those of a boundary at sigma_min = 0.
        tiny = float(torch.tensor(config.sigma_max * config.num_train_timesteps**-config.rho))
        options = {"s_noise": 0.0, "sigma_min": tiny, "clip_denoised": False}
        return type(stock).from_config(config, **options)
    if isinstance(family.path, TrigPath):
        # Here, because Diffusers has this scheduler only beside torchsde.
        from stepdistill.families.trig_schedule import TrigODEScheduler

        return TrigODEScheduler.from_config(config)
    if not isinstance(family.path, VPPath):
        return FlowMatchEulerDiscreteScheduler(shift=family.shift)
    first_order: dict[str, Any] = {
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "clip_sample": False,
        "thresholding": False,
    }
    known = inspect.signature(DDIMScheduler.__init__).parameters
    table = {name: config[name] for name in config if name in known}
    made: Any = DDIMScheduler(**{**table, **first_order})
    if made.alphas_cumprod.shape == stock.alphas_cumprod.shape:
        # The table itself: its betas' name does not give it where a scheduler shifts the SNR.
        made.alphas_cumprod = stock.alphas_cumprod.clone()
    return made
