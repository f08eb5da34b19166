"""Scheduler configurations as data: (class, values written into its defaults, what is expected).

Expected is the line that refuses, or of what is accepted (prediction, shift, alpha and sigma at
t = 1, alpha at t = 1/2), by hand where a number stands.
"""

from __future__ import annotations

import math
from typing import Any

DDIM, EULER, FLOW = "DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"
UNIPC, DPM, EDM = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "EDMEulerScheduler"
ANCESTRAL, HEUN = "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"
TABLES = (DDIM, EULER, UNIPC, DPM, ANCESTRAL, HEUN)
TABLES += ("PNDMScheduler", "DEISMultistepScheduler", "DDPMScheduler")
STEPS = "expected num_train_timesteps to be a whole number"
OFFSET = "expected steps_offset to be a whole number"
FRACTION = "to be a number between 0 and 1, got"
BETAS = "to be numbers from 0 to 1, got"
DYNAMIC = {"use_dynamic_shifting": True}
FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ZERO_SNR = {"rescale_betas_zero_snr": True}
LINE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

# The last alpha of Stable Diffusion's table.
ROOTS = [0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999 for i in range(1000)]
SD_END = math.sqrt(math.prod(1 - root**2 for root in ROOTS))
SD_LAST = ("eps", 1.0, SD_END, math.sqrt(1 - SD_END**2), None)
RESCALED = (DDIM, EULER, UNIPC, DPM, ANCESTRAL)
V = {"prediction_type": "v_prediction"}
FOUR = [0.1, 0.2, 0.3, 0.4]

SCHEDULERS: tuple[tuple[str, dict[str, Any], Any], ...] = (
    # ------------------------------------------------------------- numbers of a table
    *((name, {"steps_offset": 10**9}, OFFSET) for name in TABLES if name != HEUN),
    (DDIM, {"steps_offset": 1e9}, f"{OFFSET} from 0 to 100000, got 1000000000.0"),
    (DDIM, {"steps_offset": -1}, f"{OFFSET} from 0 to 100000, got -1"),
    (DDIM, {"steps_offset": 1000}, "expected steps_offset below num_train_timesteps, got 1000 and"),
    (DDIM, {"steps_offset": math.nan}, OFFSET),
    (DDIM, {"steps_offset": "1"}, f"{OFFSET} from 0 to 100000, got '1'"),
    (DDIM, {"steps_offset": True}, f"{OFFSET} from 0 to 100000, got True"),
    (DDIM, {"steps_offset": None}, "expected steps_offset to be a whole number, got None"),
    *((name, {"beta_start": 0.5, "beta_end": 0.1}, "expected beta_start below beta_end, got 0.5 an")
      for name in TABLES),
    *((DDIM, {"beta_start": v}, f"expected beta_start {FRACTION} {v!r}")
      for v in (-1e-4, 0, 1, 2.0, math.nan, math.inf, "0.1", True, {})),
    (DDIM, {"beta_start": []}, "expected beta_start to be a finite number, got []"),
    *((UNIPC, {"beta_end": v}, f"expected beta_end {FRACTION} {v!r}")
      for v in (-1e-4, 0, 1, math.nan, "x", False)),
    (DDIM, {"beta_end": None}, "expected beta_end to be a finite number, got None"),
    *((name, {"num_train_timesteps": 10**9}, f"{STEPS} from 1 to 100000, got 1000000000")
      for name in (*TABLES, FLOW, EDM)),
    *((DDIM, {"num_train_timesteps": v}, STEPS) for v in (0, -1, 1e3, "9", math.nan, [], None)),
    (DDIM, {"trained_betas": [0.1, 1.5]}, f"expected trained_betas {BETAS} [0.1, 1.5]"),
    (DDIM, {"trained_betas": []}, "expected trained_betas of num_train_timesteps 1000, got 0"),
    (DDIM, {"trained_betas": FOUR}, "expected trained_betas of num_train_timesteps 1000, got 4"),
    (DDIM, {"trained_betas": [0.1, math.nan]}, f"expected trained_betas {BETAS} [0.1, nan]"),
    (DDIM, {"trained_betas": 0.5}, "expected trained_betas to be a list or null, got 0.5"),
    (DDIM, {"trained_betas": "x"}, f"expected trained_betas {BETAS} 'x'"),
    (EULER, {"trained_betas": [-0.1] * 4}, f"expected trained_betas {BETAS}"),
    ("CogVideoXDDIMScheduler", {"snr_shift_scale": 0}, "expected snr_shift_scale to be a number"),
    ("CogVideoXDDIMScheduler", {"snr_shift_scale": -1}, "between 0 and 1e+06, got -1"),
    # -------------------------------------------------------------- words and switches
    (DDIM, {"prediction_type": "x"}, "to be 'epsilon' or 'sample' or 'v_prediction', got 'x'"),
    (DDIM, {"prediction_type": 3}, "to be 'epsilon' or 'sample' or 'v_prediction', got 3"),
    (DDIM, {"prediction_type": None}, "'v_prediction', got None"),
    (EULER, {"prediction_type": "x"}, "with prediction_type in ['epsilon', 'flow_prediction', 'sa"),
    (EDM, {"prediction_type": "sample"}, "to be 'epsilon' or 'v_prediction', got 'sample'"),
    (DDIM, {"timestep_spacing": "odd"}, "to be 'leading' or 'linspace' or 'trailing', got 'odd'"),
    ("PNDMScheduler", {"timestep_spacing": 3}, "or 'linspace' or 'trailing', got 3"),
    (EULER, {"interpolation_type": "x"}, "to be 'linear' or 'log_linear', got 'x'"),
    (EULER, {"timestep_type": "x"}, "to be 'discrete' or 'continuous', got 'x'"),
    (EULER, {"timestep_type": "continuous", "prediction_type": "v_prediction"}, "timestep_type di"),
    (DPM, {"final_sigmas_type": "x"}, "to be 'zero' or 'sigma_min', got 'x'"),
    (DPM, {"solver_order": -1}, "expected solver_order to be a whole number from 1 to 3, got -1"),
    (DPM, {"solver_order": 9}, "expected solver_order to be a whole number from 1 to 3, got 9"),
    (UNIPC, {"disable_corrector": "x"}, "expected disable_corrector to be a list, got 'x'"),
    (DDIM, {"beta_schedule": 3}, "expected a readable scheduler config, got 3 is not"),
    (DDIM, {"beta_schedule": "odd"}, "expected a readable scheduler config, got odd is not"),
    *((name, {"rescale_betas_zero_snr": "no"}, "to be true or false, got 'no'")
      for name in (DDIM, EULER, UNIPC, DPM)),
    (DDIM, {"set_alpha_to_one": 2}, "expected set_alpha_to_one to be true or false, got 2"),
    (DDIM, {"clip_sample": "false"}, "expected clip_sample to be true or false, got 'false'"),
    (DPM, {"use_karras_sigmas": 2.5}, "expected use_karras_sigmas to be true or false, got 2.5"),
    (DPM, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "readable scheduler config, got O"),
    (DDIM, {"thresholding": []}, "expected thresholding to be true or false, got []"),
    (DDIM, {"dynamic_thresholding_ratio": 2}, "to be a number from 0 to 1, got 2"),
    (DDIM, {"sample_max_value": -1}, "expected sample_max_value to be a number between 0 and"),
    # ------------------------------------------------------------------- flow matching
    *((FLOW, {"shift": v}, f"expected shift to be a number between 0 and 1000, got {v!r}")
      for v in (0, -3.0, 1e9, math.nan, math.inf, "3", True)),
    (FLOW, {"shift": [3]}, "expected shift to be a finite number, got [3]"),
    (FLOW, {"shift": None}, "expected shift to be a finite number, got None"),
    (FLOW, {"use_dynamic_shifting": "no"}, "to be true or false, got 'no'"),
    (FLOW, {**DYNAMIC, "max_shift": 1e3}, "expected a readable scheduler config, got math range"),
    (FLOW, {**DYNAMIC, "max_shift": 20.0}, "expected a shift between 0 and 1000, got 4.85165e+08"),
    (FLOW, {**DYNAMIC, "max_shift": -1.0, "time_shift_type": "linear"}, "and 1000, got -1. Look a"),
    (FLOW, {**DYNAMIC, "max_image_seq_len": 256}, "expected base_image_seq_len below max_image_se"),
    (FLOW, {**DYNAMIC, "base_image_seq_len": 0}, "expected base_image_seq_len to be a whole numbe"),
    (FLOW, {**DYNAMIC, "base_shift": "x"}, "expected base_shift to be a finite number or null"),
    (FLOW, {"time_shift_type": "x"}, "to be 'exponential' or 'linear', got 'x'"),
    (FLOW, {"shift_terminal": 1}, f"expected shift_terminal {FRACTION} 1"),
    (UNIPC, {**FLOW_SIGMAS, "flow_shift": 0}, "expected flow_shift to be a number between 0 and 1"),
    (UNIPC, {"use_flow_sigmas": True}, "flow_prediction with use_flow_sigmas and no other, got 'e"),
    (DPM, {"prediction_type": "flow_prediction"}, "got 'flow_prediction' with use_flow_sigmas Fal"),
    (DPM, {"use_flow_sigmas": "x"}, "expected use_flow_sigmas to be true or false, got 'x'"),
    # ----------------------------------------------------------------------------- EDM
    *((EDM, {"sigma_max": v}, f"expected sigma_max to be a number between 0 and 1e+06, got {v!r}")
      for v in (0, -1, 1e9, math.nan, "80", True)),
    (EDM, {"sigma_min": 80.0}, "expected sigma_min below sigma_max, got 80.0 and 80.0"),
    (EDM, {"sigma_min": -1}, "expected sigma_min to be a number between 0 and"),
    (EDM, {"sigma_data": 0}, "expected sigma_data to be a number between 0 and"),
    (EDM, {"rho": 0}, "expected rho to be a number between 0 and 1000, got 0"),
    (EDM, {"rho": -7.0}, "expected rho to be a number between 0 and 1000, got -7.0"),
    ("CMStochasticIterativeScheduler", {"rho": math.nan}, "between 0 and 1000, got nan"),
    # ------------------------------------------------------------------ another class's file
    (DDIM, {"_class_name": FLOW}, f"of {DDIM}, which model_index.json names, got _class_name "),
    (FLOW, {"_class_name": EULER}, f"got _class_name '{EULER}'"),
    (DDIM, {"_class_name": "OddScheduler"}, "got _class_name 'OddScheduler'"),
    (DDIM, {"_class_name": 3}, "got _class_name 3"),
    (DDIM, {"_class_name": ["a", "b"]}, "got _class_name ['a', 'b']"),
    (EDM, {"_class_name": DDIM}, f"got _class_name '{DDIM}'"),
    # ------------------------------------------------- zero terminal SNR: eps, and what is right
    *((name, {**LINE, **ZERO_SNR}, "expected v_prediction with zero terminal SNR, got epsilon")
      for name in RESCALED),
    *((name, ZERO_SNR, "expected v_prediction with zero terminal SNR, got epsilon")
      for name in RESCALED),
    # Those that know no such option are told it for another's table.
    *((name, {**LINE, **ZERO_SNR}, "expected v_prediction with zero terminal SNR, got epsilon")
      for name in ("PNDMScheduler", HEUN, "DEISMultistepScheduler", "DDPMScheduler",
                   "LCMScheduler", "TCDScheduler", "DDIMParallelScheduler")),
    (DDIM, {"trained_betas": [0.5, 1 - 1e-13], "num_train_timesteps": 2}, "zero terminal SNR, got"),
    # ---------------------------------------------------------------- accepted, by value
    *((name, LINE, SD_LAST) for name in TABLES),
    (DDIM, {**LINE, "steps_offset": 1}, SD_LAST),
    (DDIM, {**LINE, "_class_name": "PNDMScheduler"}, ("eps", 1.0, SD_END, None, None)),
    # Files that were made of another solver's, as from_config does.
    (DPM, {**LINE, "variance_type": "fixed_small"}, SD_LAST),
    (DPM, {**LINE, "solver_type": "logrho"}, SD_LAST),
    (UNIPC, {**LINE, "solver_type": "midpoint"}, SD_LAST),
    ("DEISMultistepScheduler", {**LINE, "algorithm_type": "dpmsolver++"}, SD_LAST),
    (FLOW, {"sigma_min": 80.0, "sigma_max": 0.002}, ("flow", 1.0, 0.0, 1.0, 0.5)),
    (DDIM, {**LINE, "clip_sample": None}, ("eps", 1.0, SD_END, None, None)),
    *((name, {"beta_start": 0.1, "beta_end": 0.1, "num_train_timesteps": 4},
       ("eps", 1.0, 0.9**2, math.sqrt(1 - 0.9**4), 0.9)) for name in TABLES),
    *((name, {"trained_betas": FOUR, "num_train_timesteps": 4},
       ("eps", 1.0, math.sqrt(0.9 * 0.8 * 0.7 * 0.6), math.sqrt(1 - 0.3024), math.sqrt(0.72)))
      for name in TABLES),
    *((name, {**LINE, **V}, ("v", 1.0, SD_END, None, None))
      for name in TABLES),
    (DDIM, {**LINE, "prediction_type": "sample"}, ("x0", 1.0, SD_END, None, None)),
    (DDIM, {**LINE, **ZERO_SNR, **V}, ("v", 1.0, 0.0, 1.0, None)),
    *((name, {**LINE, **ZERO_SNR, **V}, ("v", 1.0, 2**-12, 1.0, None))
      for name in RESCALED[1:]),
    # With DDPM's betas 2^-24 is above the entry before it: the table ends at 0, as was meant.
    *((name, {**ZERO_SNR, **V}, ("v", 1.0, 0.0, 1.0, None))
      for name in RESCALED),
    (FLOW, {"shift": 3}, ("flow", 3.0, 0.0, 1.0, 0.5)),
    (FLOW, {"shift": 17.0, "shift_terminal": 0.02}, ("flow", 17.0, 0.0, 1.0, 0.5)),
    (FLOW, DYNAMIC, ("flow", math.exp(1.15), 0.0, 1.0, 0.5)),
    (FLOW, {**DYNAMIC, "time_shift_type": "linear"}, ("flow", 1.15, 0.0, 1.0, 0.5)),
    (UNIPC, {**FLOW_SIGMAS, "flow_shift": 5.0}, ("flow", 5.0, 0.0, 1.0, 0.5)),
    (DPM, {**FLOW_SIGMAS, "flow_shift": 3}, ("flow", 3.0, 0.0, 1.0, 0.5)),
    (EDM, {}, ("x0", 1.0, 1.0, 80.0, 1.0)),
    (EDM, {"sigma_max": 2, "rho": 1, **V}, ("x0", 1.0, 1.0, 2.0, 1.0)),
)  # fmt: skip
