"""Our sampler against stock Diffusers schedulers' own `step`, and SamplerSpec's rules.

The network is a fixed smooth function of (x, t): both loops call it at the same points, so any
difference is the scheduler's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    TCDScheduler,
)
from support.fixed import EMPTY, SHAPE, STOCK_KIND, Fixed, network
from torch import Tensor

from stepdistill.core.path import FlowPath, NoisePath, VPPath
from stepdistill.core.solvers import (
    SamplerSpec,
    boundary_coeffs,
    cd_boundary_coeffs,
    one_call_x0,
    sample_x0,
)
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.testing.analytic import GaussianTeacher

SD: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}


TABLE = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)[1:]  # to pure noise


def stock_loop(scheduler: Any, noise: Tensor, seed: int, **step: Any) -> list[Tensor]:
    """x after every stock step, with fresh noise from one seeded generator."""
    gen, x, trail = torch.Generator().manual_seed(seed), noise, []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, generator=gen, **step).prev_sample
        trail.append(x)
    return trail


def noise_and_fresh(seed: int, draws: int) -> tuple[Tensor, list[Tensor]]:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(99))
    gen = torch.Generator().manual_seed(seed)
    return noise, [torch.randn(SHAPE, generator=gen) for _ in range(draws)]


def ours(path: NoisePath, kind: str, spec: SamplerSpec, noise: Tensor, fresh: list[Tensor]) -> Any:
    return sample_x0(Fixed(path, kind), spec, noise, EMPTY, fresh_noise=fresh.__getitem__)  # type: ignore[arg-type]


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_ode_equals_ddim(kind: str, num_steps: int, zero_snr: bool) -> None:
    if zero_snr and kind == "eps":
        pytest.skip("x0 is undefined from eps at alpha = 0")
    scheduler = DDIMScheduler(
        **SD,
        prediction_type=STOCK_KIND[kind],
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )
    scheduler.set_timesteps(num_steps)
    noise, fresh = noise_and_fresh(0, 0)
    got = ours(
        VPPath(scheduler.alphas_cumprod), kind, SamplerSpec(uniform_grid(num_steps), "ode"), noise,
        fresh,
    )  # fmt: skip
    assert (got - stock_loop(scheduler, noise, 0, eta=0.0)[-1]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_stochastic_step_equals_ddim_with_eta_1(kind: str) -> None:
    scheduler = DDIMScheduler(**SD, prediction_type=STOCK_KIND[kind], timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    path = VPPath(scheduler.alphas_cumprod)
    x, fresh = noise_and_fresh(1, 4)
    x = 0.5 * x
    ends = [0.75, 0.5, 0.25, 0.0]
    for i, index in enumerate(scheduler.timesteps):
        out = network(x, float(index))
        stock = scheduler.step(out, index, x, eta=1.0, variance_noise=fresh[i]).prev_sample
        t = path.time_of(index).expand(2)
        s = torch.full((2,), ends[i]).double()
        got = path.step(path.to_x0(out, x, t, kind), x, t, s, 1.0, fresh[i])  # type: ignore[arg-type]
        assert (got - stock).abs().max() < 1e-5
        x = stock


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize(
    ("num_steps", "indices"),
    [(1, [999]), (2, [999, 499]), (4, [999, 759, 499, 259])],
)
def test_renoise_equals_lcm(kind: str, num_steps: int, indices: list[int]) -> None:
    scheduler = LCMScheduler(**SD, prediction_type=STOCK_KIND[kind])
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == indices
    noise, fresh = noise_and_fresh(1, num_steps)
    times = tuple((n + 1) / 1000 for n in indices)
    spec = SamplerSpec(times, "renoise", boundary_scale=10.0)
    got = ours(VPPath(scheduler.alphas_cumprod), kind, spec, noise, fresh)
    assert (got - stock_loop(scheduler, noise, 1)[-1]).abs().max() < 1e-5


def test_boundary_matches_lcm_where_it_matters() -> None:
    """At small scaling the skip is far from 0, so a wrong blend would show."""
    scheduler = LCMScheduler(**SD, timestep_scaling=0.002)
    scheduler.set_timesteps(4)
    noise, fresh = noise_and_fresh(1, 4)
    spec = SamplerSpec((1.0, 0.76, 0.5, 0.26), "renoise", boundary_scale=0.002)
    path = VPPath(scheduler.alphas_cumprod)
    stock = stock_loop(scheduler, noise, 1)[-1]
    assert (ours(path, "eps", spec, noise, fresh) - stock).abs().max() < 1e-5
    plain = SamplerSpec(spec.times, "renoise")
    assert (ours(path, "eps", plain, noise, fresh) - stock).abs().max() > 1e-2
    skip, out = boundary_coeffs(torch.tensor([0.0, 500.0]), 0.002)
    stock_skip, stock_out = scheduler.get_scalings_for_boundary_condition_discrete(500)
    assert skip.tolist() == pytest.approx([1.0, stock_skip])
    assert out.tolist() == pytest.approx([0.0, stock_out])


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5])
def test_tcd_equals_tcd(kind: str, gamma: float) -> None:
    """Every step but the last; stock TCD ends at table index 0 (t = 1/1000), ours at t = 0."""
    scheduler = TCDScheduler(**SD, prediction_type=STOCK_KIND[kind])
    scheduler.set_timesteps(4)
    noise, fresh = noise_and_fresh(1, 4)
    trail = stock_loop(scheduler, noise, 1, eta=gamma)
    path = VPPath(scheduler.alphas_cumprod)
    times = (1.0, 0.76, 0.5, 0.26)
    spec = SamplerSpec(times, "tcd", gamma=gamma)
    x0 = ours(path, kind, spec, noise, fresh)
    t, end = torch.full((2,), 0.26).double(), torch.full((2,), 0.001).double()
    assert (path.step(x0, trail[-2], t, end) - trail[-1]).abs().max() < 1e-5


def test_tcd_with_gamma_1_is_renoise() -> None:
    noise, fresh = noise_and_fresh(1, 4)
    for path, kind in ((VPPath.from_betas(DDIMScheduler(**SD).betas), "eps"), (FlowPath(), "flow")):
        tcd = ours(path, kind, SamplerSpec(uniform_grid(4), "tcd", gamma=1.0), noise, fresh)
        lcm = ours(path, kind, SamplerSpec(uniform_grid(4), "renoise"), noise, fresh)
        assert (tcd - lcm).abs().max() < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
@pytest.mark.parametrize("rule", ["ode", "renoise"])
def test_flow_equals_flow_match(rule: str, num_steps: int, shift: float) -> None:
    cls = FlowMatchEulerDiscreteScheduler if rule == "ode" else FlowMatchLCMScheduler
    scheduler = cls(shift=shift)
    scheduler.set_timesteps(sigmas=list(uniform_grid(num_steps)))
    noise, fresh = noise_and_fresh(1, num_steps)
    spec = SamplerSpec(uniform_grid(num_steps, shift), rule)  # type: ignore[arg-type]
    got = ours(FlowPath(), "flow", spec, noise, fresh)
    assert (got - stock_loop(scheduler, noise, 1)[-1]).abs().max() < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [2, 4])
def test_heun_equals_flow_match_heun(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    noise, _ = noise_and_fresh(1, 0)
    times = tuple(dict.fromkeys(scheduler.sigmas[:-1].double().tolist()))
    assert len(times) == num_steps
    assert len(scheduler.timesteps) == SamplerSpec(times, "ode", heun=True).num_calls
    got = ours(FlowPath(), "flow", SamplerSpec(times, "ode", heun=True), noise, [])
    # Theirs divides float32 rounding by its last sigma, 1e-3.
    assert (got - stock_loop(scheduler, noise, 1)[-1]).abs().max() < 1e-4


def test_heun_is_for_deterministic_steps_alone() -> None:
    for spec in ({"kind": "renoise"}, {"kind": "tcd"}, {"kind": "ode", "boundary_scale": 10.0}):
        with pytest.raises(ValueError, match="heun with kind ode or anchored"):
            SamplerSpec((1.0, 0.5), heun=True, **spec)  # type: ignore[arg-type]


def test_spec_refuses_times_off_the_trained_grid() -> None:
    grid = uniform_grid(4)
    with pytest.raises(ValueError, match=r"trained grid .* got \[0\.33.*trained for"):
        SamplerSpec((1.0, 1.0 / 3.0), trained_times=grid)
    assert SamplerSpec((1.0, 0.5), trained_times=grid).num_steps == 2
    assert SamplerSpec((1.0,), trained_times=grid).with_steps(2).times == (1.0, 0.5)
    with pytest.raises(ValueError, match="trained grid"):
        SamplerSpec((1.0,), trained_times=grid).with_steps(3)


def test_with_steps_keeps_the_rule() -> None:
    spec = SamplerSpec((1.0,), "tcd", guidance=2.0, w=3.0, gamma=0.3, boundary_scale=10.0)
    assert spec.with_steps(2) == SamplerSpec(
        (1.0, 0.5), "tcd", guidance=2.0, w=3.0, gamma=0.3, boundary_scale=10.0
    )


@pytest.mark.parametrize("times", [(), (0.5, 1.0), (0.5, 0.5)])
def test_spec_refuses_times_that_do_not_descend(times: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="descending times"):
        SamplerSpec(times)


@pytest.mark.parametrize("kind", ["renoise", "tcd"])
def test_stochastic_rules_ask_for_noise(kind: str) -> None:
    spec = SamplerSpec((1.0, 0.5), kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected fresh_noise"):
        sample_x0(Fixed(FlowPath(), "flow"), spec, torch.zeros(SHAPE), EMPTY)


@pytest.mark.parametrize(
    ("kind", "gamma", "ends"),
    [("ode", 0.0, [0.5, 0.25, 0.0]), ("tcd", 0.4, [0.3, 0.15, 0.0]), ("renoise", 0.0, [0.0] * 3)],
)
def test_a_network_is_told_where_its_own_jump_ends(kind: Any, gamma: float, ends: list) -> None:
    """Noise travel goes on from there: the network jumps to the cleaner time."""

    class Told(Fixed):
        seen: ClassVar[list[float]] = []

        def raw(self, *args: Any) -> Any:
            assert self.end is not None
            self.seen.append(float(self.end[0]))
            return super().raw(*args)

    spec = SamplerSpec((1.0, 0.5, 0.25), kind, gamma=gamma, tells_end=True)
    noise, fresh = noise_and_fresh(0, 2)
    net = Told(FlowPath(), "flow")
    sample_x0(net, spec, noise, EMPTY, fresh_noise=fresh.__getitem__)
    assert net.seen == pytest.approx(ends)
    one_call_x0(net, spec, noise, torch.full((len(noise),), 0.5, dtype=torch.float64), EMPTY)
    assert net.seen[-1] == 0.0


def test_the_specs_guidance_is_used_unless_overridden() -> None:
    teacher = GaussianTeacher(FlowPath(), 0.5)
    noise = torch.zeros(2, 1, 1, 1)
    cond, null = (Cond({"mean": torch.full((2, 1, 1, 1), m)}) for m in (1.0, 0.2))
    spec = SamplerSpec((1.0,), "ode", guidance=3.0)
    assert sample_x0(teacher, spec, noise, cond, null)[0].item() == pytest.approx(0.2 + 3.0 * 0.8)
    assert sample_x0(teacher, spec, noise, cond, null, 1.0)[0].item() == pytest.approx(1.0)


@pytest.mark.parametrize("path", [FlowPath(), VPPath(TABLE)], ids=["flow", "vp"])
def test_multistep_is_of_second_order(path) -> None:
    """Half the step, a quarter of the error; from eight steps on nearer than twice as many of the
    first order."""
    teacher = GaussianTeacher(path, 0.5)
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    cond = Cond({"mean": torch.ones(4, 1, 1, 1)})
    ends = (torch.full((4,), t, dtype=torch.float64) for t in (1.0, 0.0))
    exact = teacher.flow_map(path.prior(noise), *ends, cond)

    def error(steps: int, multistep: bool) -> float:
        spec = SamplerSpec(uniform_grid(steps), "ode", multistep=multistep)
        return float((sample_x0(teacher, spec, noise, cond) - exact).abs().max())

    assert error(40, True) < 0.3 * error(20, True)
    assert error(8, True) < error(16, False)


def test_multistep_is_for_deterministic_steps_alone() -> None:
    with pytest.raises(ValueError, match="expected multistep with kind ode"):
        SamplerSpec((1.0, 0.5), "renoise", multistep=True)


@pytest.mark.parametrize(("sigma", "lowest"), [(3.0, 0.2), (0.7, 0.3), (80.0, 0.002)])
def test_cd_boundary_is_the_shifted_preconditioning_of_the_same_network(sigma, lowest) -> None:
    """F is read from D = c_skip x + c_out F and put into c_skip x + c_out F, shifted."""
    data = 0.5
    c_skip, c_out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
    shifted_skip = data**2 / ((sigma - lowest) ** 2 + data**2)
    shifted_out = (sigma - lowest) * data / math.sqrt(sigma**2 + data**2)
    x, denoised = 1.7, -0.4
    expected = shifted_skip * x + shifted_out * (denoised - c_skip * x) / c_out
    skip, out = cd_boundary_coeffs(torch.tensor([sigma], dtype=torch.float64), lowest)
    assert float(skip * x + out * denoised) == pytest.approx(expected, rel=1e-12)
    assert float(out) == pytest.approx(1.0 - lowest / sigma, rel=1e-12)


def test_cd_boundary_gives_back_its_input_at_sigma_min() -> None:
    sigma = torch.tensor([0.002, 80.0], dtype=torch.float64)
    assert [c[0].item() for c in cd_boundary_coeffs(sigma, 0.002)] == pytest.approx([1.0, 0.0])
    assert [c[1].item() for c in cd_boundary_coeffs(sigma, 0.0)] == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("at", [0, 1, 2, None])
@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_one_call_alone_has_a_graph_and_its_x0_is_returned(kind, at) -> None:
    class Scaled(Fixed):
        weight = torch.tensor(1.3, requires_grad=True)

        def raw(self, x_t, t, cond, w, features):
            inputs.append(x_t)
            out, features = super().raw(x_t, t, cond, w, features)
            return self.weight * out, features

    inputs: list[Tensor] = []
    noise, fresh = noise_and_fresh(0, 2)
    spec, net = SamplerSpec((1.0, 0.7, 0.3), kind), Scaled(FlowPath(), "flow")
    x0 = sample_x0(net, spec, noise, EMPTY, fresh_noise=fresh.__getitem__, gradient_at=at)
    assert len(inputs) == (3 if at is None else at + 1)
    assert not any(x.requires_grad for x in inputs)
    assert x0.requires_grad == (at is not None)
    if at is not None:
        t = torch.full((2,), spec.times[at], dtype=torch.float64)
        torch.testing.assert_close(x0, net(inputs[at], t, EMPTY).x0)


def test_another_expert_goes_on_at_the_next_time_of_its_grid() -> None:
    grid = (1.0, 0.8, 0.5, 0.2)
    assert SamplerSpec((1.0, 0.8), grid=grid).hands_over == 0.5
    assert SamplerSpec((1.0, 0.8, 0.5), grid=grid).hands_over == 0.2
    assert SamplerSpec((0.5, 0.2), grid=grid).hands_over == 0.0
    assert SamplerSpec((1.0, 0.8)).hands_over == 0.0
    assert SamplerSpec((1.0, 0.8), trained_times=(1.0, 0.8), grid=grid).whole.times == grid
