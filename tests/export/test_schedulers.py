"""The exported scheduler, saved and loaded again, walks as the in-memory sampler walks.

The network is a fixed smooth function of (x, t), so any difference is the scheduler's. Whole loops
are compared, last step included, from the saved config and the recorded call alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from support.fixed import EMPTY, SHAPE, STOCK_KIND, Fixed, network

from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, PredictionType, VEPath, VPPath
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.times import uniform_grid
from stepdistill.export.flow_grid import flow_match_config
from stepdistill.export.schedulers import StockSampler, path_betas, stock_sampler
from stepdistill.loading.project_code import part_class, project_file
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.consistency_config import ConsistencyConfig

NO_ARGUMENTS: frozenset[str] = frozenset()  # DiTPipeline's call takes no times and no eta
PLAIN_CALL = frozenset({"num_inference_steps"})


def teacher(kind: str = "epsilon", zero_snr: bool = False) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=kind,
        rescale_betas_zero_snr=zero_snr,
    )


def difference(
    sampler: StockSampler, path: NoisePath, kind: PredictionType, spec: SamplerSpec, folder: Path
) -> float:
    """max |stock loop - sample_x0| with one stream of fresh noise."""
    sampler.scheduler.save_pretrained(folder)
    made = type(sampler.scheduler)
    library = made.__module__ if project_file(made.__module__) else "diffusers"
    stock: Any = part_class(library, made.__name__).from_pretrained(folder)
    call = dict(sampler.call)
    step = {"eta": call.pop("eta")} if "eta" in call else {}
    stock.set_timesteps(**(call or {"num_inference_steps": spec.num_steps}))
    x = noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9))
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        for t in stock.timesteps:
            x = stock.step(network(x, float(t)), t, x, **step).prev_sample
        torch.manual_seed(1)
        ours = sample_x0(
            Fixed(path, kind),
            spec,
            noise,
            EMPTY,
            fresh_noise=lambda _step: torch.randn(SHAPE),
        )
    assert stock.timesteps.tolist() == pytest.approx(list(sampler.visited), abs=1e-3)
    return float((x - ours).abs().max())


SPECS = {
    "renoise_1": SamplerSpec((1.0,), "renoise"),
    "renoise_4": SamplerSpec(uniform_grid(4), "renoise"),
    "renoise_thirds": SamplerSpec((1.0, 0.667, 0.333), "renoise"),
    "renoise_lcm": SamplerSpec((1.0, 0.76, 0.5, 0.26), "renoise", boundary_scale=10.0),
    "renoise_late": SamplerSpec((0.4,), "renoise"),
    "ode_1": SamplerSpec((1.0,), "ode"),
    "ode_4": SamplerSpec(uniform_grid(4), "ode"),
    "ode_thirds": SamplerSpec((1.0, 0.667, 0.333), "ode"),
    "ode_uneven": SamplerSpec((1.0, 0.6, 0.1), "ode"),
    "tcd_0": SamplerSpec(uniform_grid(4), "tcd", gamma=0.0),
    "tcd_.3": SamplerSpec((1.0, 0.76, 0.5, 0.26), "tcd", gamma=0.3),
    "tcd_1": SamplerSpec(uniform_grid(4), "tcd", gamma=1.0),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    ("kind", "zero_snr"), [("eps", False), ("v", False), ("v", True), ("x0", True)]
)
def test_vp_walk(name: str, kind: PredictionType, zero_snr: bool, tmp_path: Path) -> None:
    base = teacher(STOCK_KIND[kind], zero_snr)
    path, spec = VPPath(base.alphas_cumprod), SPECS[name]
    sampler = stock_sampler(base, path, spec)
    assert difference(sampler, path, kind, spec, tmp_path) < 2e-5


def test_uniform_vp_steps_need_no_extra_argument() -> None:
    base = teacher()
    path = VPPath(base.alphas_cumprod)
    for kind in ("ode", "renoise"):
        for steps in (1, 2, 4, 8):
            spec = SamplerSpec(uniform_grid(steps), kind)  # type: ignore[arg-type]
            assert stock_sampler(base, path, spec, accepts=NO_ARGUMENTS).call == {}


def test_lcm_grid_serves_every_step_count_from_one_config() -> None:
    base = teacher()
    grid = tuple(t / 50 for t in range(50, 0, -1))
    spec = SamplerSpec((1.0, 0.76, 0.5, 0.26), trained_times=grid, boundary_scale=10.0)
    scheduler = stock_sampler(base, VPPath(base.alphas_cumprod), spec).scheduler
    assert scheduler.config.original_inference_steps == 50
    assert scheduler.config.timestep_scaling == 10.0
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499]


def test_plain_x0_needs_no_blend() -> None:
    base = teacher()
    made = stock_sampler(base, VPPath(base.alphas_cumprod), SamplerSpec((1.0, 0.002))).scheduler
    skip, out = made.get_scalings_for_boundary_condition_discrete(1)
    assert skip < 1e-7
    assert abs(out - 1.0) < 1e-7


def test_noise_table_survives_any_teacher_scheduler() -> None:
    """Euler moves the last entry off 0; a trained table has no name: both are spelt out."""
    euler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    trained = DDIMScheduler(trained_betas=torch.linspace(1e-4, 0.03, 1000).tolist())
    times = torch.arange(1, 1001).double() / 1000
    for base in (euler, trained):
        path = VPPath(base.alphas_cumprod)
        for kind in ("ode", "renoise"):
            made = stock_sampler(base, path, SamplerSpec(uniform_grid(2), kind)).scheduler  # type: ignore[arg-type]
            error = made.alphas_cumprod.double().sqrt() - path.coeffs(times)[0]
            assert error.abs().max() < 1e-5


def test_clean_start_changes_index_0_alone() -> None:
    base = teacher()
    path = VPPath(base.alphas_cumprod)
    clean = torch.cumprod(1 - torch.tensor(path_betas(path, clean_start=True)), 0)
    assert clean[0] == 1.0
    assert (clean[1:] - base.alphas_cumprod[1:]).abs().max() < 1e-6
    assert torch.allclose(torch.tensor(path_betas(path)), base.betas, atol=1e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 1.15, 3.0, 5.0, 12.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_flow_walk_from_the_config_alone(
    kind: str, steps: int, shift: float, tmp_path: Path
) -> None:
    spec = SamplerSpec(uniform_grid(steps, shift), kind)  # type: ignore[arg-type]
    base, path = FlowMatchEulerDiscreteScheduler(shift=shift), FlowPath()
    sampler = stock_sampler(base, path, spec, accepts=PLAIN_CALL)
    assert sampler.call == {}
    assert difference(sampler, path, "flow", spec, tmp_path) < 1e-5


@pytest.mark.parametrize("sends_sigmas", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_no_call_is_wasted_and_no_shift_counts_twice(
    steps: int, shift: float, sends_sigmas: bool, tmp_path: Path
) -> None:
    """Stock FlowMatchEuler ends at 0.001 and shifts what it is sent; the saved one neither."""
    grid = uniform_grid(steps, shift)
    base = FlowMatchEulerDiscreteScheduler(shift=3.0)
    spec = SamplerSpec(grid, "ode")
    sampler = stock_sampler(base, FlowPath(), spec, False, PLAIN_CALL, sends_sigmas)
    sampler.scheduler.save_pretrained(tmp_path)
    for loaded, right in ((type(base).from_pretrained(tmp_path), True), (base, False)):
        sent = {"sigmas": [1.0 - i / steps for i in range(steps)]}
        loaded.set_timesteps(**(sent if sends_sigmas else {"num_inference_steps": steps}))
        fits = loaded.sigmas.tolist() == pytest.approx([*grid, 0.0], abs=1e-6)
        # The teacher's own is right for one step, and for its own shift where it is sent sigmas.
        assert fits == (right or steps == 1 or (sends_sigmas and shift == 3.0))


@pytest.mark.parametrize("sends_sigmas", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
def test_lcm_on_flow_needs_no_typed_sigmas(
    steps: int, shift: float, sends_sigmas: bool, tmp_path: Path
) -> None:
    """Steps that do not divide the 50 trained times, on pipelines that type sigmas or don't."""
    method = Consistency(ConsistencyConfig(num_grid=50), Setting(FlowPath(), "flow", shift))
    spec = method.sampler(steps)
    base = FlowMatchEulerDiscreteScheduler(shift=shift)
    made = stock_sampler(base, FlowPath(), spec, False, PLAIN_CALL, sends_sigmas)
    assert (type(made.scheduler).__name__, made.call) == ("FlowMatchLCMScheduler", {})
    if sends_sigmas:
        made.scheduler.set_timesteps(sigmas=[1.0 - i / steps for i in range(steps)])
        assert made.scheduler.sigmas.tolist() == pytest.approx([*spec.times, 0.0], abs=1e-6)
    else:
        assert difference(made, FlowPath(), "flow", spec, tmp_path) < 1e-5


def test_unshifted_config_is_shift_terminal_alone() -> None:
    assert flow_match_config(uniform_grid(4)) == {"shift": 1.0, "shift_terminal": 0.25}
    assert flow_match_config((1.0,)) == {"shift": 1.0}


@pytest.mark.parametrize("times", [(1.0, 0.9, 0.5, 0.4), (0.9, 0.5)])
def test_other_flow_grids_go_into_the_call(times: tuple[float, ...], tmp_path: Path) -> None:
    spec, path = SamplerSpec(times, "ode"), FlowPath()
    base = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler = stock_sampler(base, path, spec)
    assert sampler.call == {"sigmas": list(times)}
    assert sampler.scheduler.config.shift == 1.0
    assert difference(sampler, path, "flow", spec, tmp_path) < 1e-5
    with pytest.raises(ValueError, match="takes no sigmas"):
        stock_sampler(base, path, spec, accepts=PLAIN_CALL)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_tcd_on_flow_is_a_scheduler_of_ours(shift: float, tmp_path: Path) -> None:
    spec = SamplerSpec(uniform_grid(4, shift), "tcd", gamma=0.3)
    base = FlowMatchEulerDiscreteScheduler(shift=shift)
    sampler = stock_sampler(base, FlowPath(), spec, accepts=PLAIN_CALL)
    assert (type(sampler.scheduler).__name__, sampler.call) == ("FlowMatchTCDScheduler", {})
    assert difference(sampler, FlowPath(), "flow", spec, tmp_path) < 2e-5


@pytest.mark.parametrize(
    ("kind", "gamma"), [("ode", 0.0), ("renoise", 0.0), ("tcd", 1.0), ("tcd", 0.3)]
)
def test_velocity_student_in_a_vp_pipeline(kind: str, gamma: float, tmp_path: Path) -> None:
    spec = SamplerSpec(uniform_grid(4), kind, gamma=gamma)  # type: ignore[arg-type]
    sampler = stock_sampler(teacher(), FlowPath(), spec, flow_in_vp=True)
    assert difference(sampler, FlowPath(), "flow", spec, tmp_path) < 1e-5
    saved = type(sampler.scheduler).from_pretrained(tmp_path)
    assert saved.init_noise_sigma == 1.0


def test_velocity_student_in_a_plain_loop(tmp_path: Path) -> None:
    spec = SamplerSpec(uniform_grid(4, 3.0), "ode")
    sampler = stock_sampler(teacher(), FlowPath(), spec, flow_in_vp=True, accepts=PLAIN_CALL)
    assert difference(sampler, FlowPath(), "flow", spec, tmp_path) < 1e-5
    x = torch.zeros(SHAPE)
    assert sampler.scheduler.scale_model_input(x, 1.0) is x


def test_one_late_step_needs_no_argument_in_a_plain_loop(tmp_path: Path) -> None:
    """Its index is a saved DDIM's offset, not 999 as in LCM's."""
    spec, base = SamplerSpec((0.4,)), teacher()
    path = VPPath(base.alphas_cumprod)
    sampler = stock_sampler(base, path, spec, accepts=PLAIN_CALL)
    assert (sampler.visited, sampler.call) == ((399,), {})
    assert difference(sampler, path, "eps", spec, tmp_path) < 1e-5


@pytest.mark.parametrize(
    ("path", "spec", "accepts", "message"),
    [
        (VEPath(), SamplerSpec((1.0, 0.5)), PLAIN_CALL, "kind ode .Euler. .* DDIMScheduler"),
        (FlowPath(), SamplerSpec((1.0,), boundary_scale=10.0), PLAIN_CALL, "plain x0"),
        (None, SamplerSpec((0.4, 0.2)), PLAIN_CALL, r"call takes none, got \[399, 199\]"),
        (None, SamplerSpec((0.4,), boundary_scale=10.0), PLAIN_CALL, r"takes none, got \[399\]"),
        (None, SamplerSpec((1.0, 0.6), "ode"), PLAIN_CALL, "without `eta`"),
        (None, SamplerSpec((1.0, 0.5), "tcd", gamma=0.3), PLAIN_CALL, "gamma 0.3"),
        (None, SamplerSpec((1.0,), "ode", boundary_scale=10.0), PLAIN_CALL, "renoise alone"),
    ],
)
def test_what_no_stock_scheduler_samples_is_refused(
    path: NoisePath | None, spec: SamplerSpec, accepts: frozenset[str], message: str
) -> None:
    base = teacher()
    with pytest.raises(ValueError, match=message):
        stock_sampler(base, path or VPPath(base.alphas_cumprod), spec, accepts=accepts)


def test_velocity_renoise_in_a_plain_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="setup: wrapped"):
        stock_sampler(
            teacher(), FlowPath(), SamplerSpec((1.0,)), flow_in_vp=True, accepts=PLAIN_CALL
        )
