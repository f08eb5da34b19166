"""Path algebra in float64: conversions invert, steps compose, noise travel keeps the marginal."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from stepdistill.core.path import PREDICTION_TYPES, FlowPath, NoisePath, TrigPath, VEPath, VPPath
from stepdistill.core.times import uniform_grid

SD_BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2


def sd_path() -> VPPath:
    return VPPath.from_betas(SD_BETAS)


def zero_snr_path() -> VPPath:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    )
    return VPPath(scheduler.alphas_cumprod)


PATHS = {"sd": sd_path, "zero_snr": zero_snr_path, "flow": FlowPath, "ve": VEPath}


@pytest.fixture(params=sorted(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]()


def draws(bsz: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (bsz, 2, 3, 3)
    return (
        torch.randn(shape, generator=gen, dtype=torch.float64),
        torch.randn(shape, generator=gen, dtype=torch.float64),
    )


def times(path: NoisePath) -> torch.Tensor:
    """Interior times, plus the whole table of a VP path."""
    if isinstance(path, VPPath):
        return torch.arange(1, 1001, dtype=torch.float64) / 1000
    return torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


def defined(path: NoisePath, t: torch.Tensor, kind: str) -> torch.Tensor:
    """Where x0 can be read from that type: eps needs alpha > 0."""
    alpha, _ = path.coeffs(t)
    return alpha > 1e-3 if kind == "eps" else torch.ones_like(alpha, dtype=torch.bool)


@pytest.mark.parametrize("src", PREDICTION_TYPES)
@pytest.mark.parametrize("dst", PREDICTION_TYPES)
def test_conversions_invert(path: NoisePath, src: str, dst: str) -> None:
    t = times(path)
    t = t[defined(path, t, src) & defined(path, t, dst)]
    x0, eps = draws(len(t))
    x_t = path.add_noise(x0, eps, t)
    out = path.convert(x0, x_t, t, "x0", src)
    there = path.convert(out, x_t, t, src, dst)
    back = path.convert(there, x_t, t, dst, src)
    # eps and x0 are recovered by dividing by sigma: rounding grows with 1/sigma on VE's clean end.
    sigma = path.coeffs(t)[1].view(-1, 1, 1, 1)
    assert ((back - out).abs() * sigma.clamp_max(1.0)).max() < 1e-10
    assert (path.to_x0(there, x_t, t, dst) - x0).abs().max() < 1e-10 * max(1.0, sigma.max())


def test_conversions_give_the_definitions(path: NoisePath) -> None:
    t = times(path)[5:-5:7]
    x0, eps = draws(len(t))
    alpha, sigma = (c.view(-1, 1, 1, 1) for c in path.coeffs(t))
    x_t = path.add_noise(x0, eps, t)
    expected = {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}
    for kind, value in expected.items():
        error = (path.convert(x0, x_t, t, "x0", kind) - value).abs() * sigma.clamp_max(1.0)
        assert error.max() < 1e-10, kind


def test_log_snr_is_of_alpha_squared_over_sigma_squared() -> None:
    t = torch.tensor([0.2, 0.5], dtype=torch.float64)
    expected = torch.tensor([math.log(16.0), 0.0], dtype=torch.float64)
    assert (FlowPath().log_snr(t) - expected).abs().max() < 1e-14


@pytest.mark.parametrize("make", [zero_snr_path, FlowPath])
def test_noise_travel_from_pure_noise_stays_there(make) -> None:
    """alpha is 0 at t = 1, so nothing can be noisier: the kernel is the identity."""
    x, noise = draws(2)
    one = torch.ones(2, dtype=torch.float64)
    assert make().coeffs(one)[0].tolist() == [0.0, 0.0]
    assert torch.equal(make().renoise(x, one, one, noise), x)


def test_a_table_follows_the_times_to_their_device() -> None:
    alpha, sigma = sd_path().coeffs(torch.empty(3, device="meta"))
    assert (alpha.device.type, sigma.device.type) == ("meta", "meta")


def test_a_table_may_stand_still_but_never_rise() -> None:
    assert VPPath(torch.tensor([0.9, 0.5, 0.5, 0.0])).num_steps == 4
    with pytest.raises(ValueError, match="expected a decreasing alphas_cumprod"):
        VPPath(torch.tensor([0.9, 0.5, 0.6]))


def test_times_on_a_table_are_told_as_whole_numbers() -> None:
    """49 (n / 49) is not n in float64 for each n."""
    path, n = VPPath(torch.linspace(0.99, 0.01, 49)), torch.arange(49)
    assert not torch.equal(path.time_of(n) * 49 - 1, n.double())
    assert path.model_time(path.time_of(n)).tolist() == n.tolist()


@pytest.mark.parametrize("make", [FlowPath, VEPath, sd_path])
def test_time_of_is_the_inverse_of_model_time(make) -> None:
    t = torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64)
    assert (make().time_of(make().model_time(t)) - t).abs().max() < 1e-12


def test_convert_refuses_unknown_type() -> None:
    x, t = torch.zeros(1, 1, 2, 2), torch.tensor([0.5])
    with pytest.raises(ValueError, match="expected one of"):
        FlowPath().convert(x, x, t, "x0", "score")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected one of"):
        FlowPath().to_x0(x, x, t, "score")  # type: ignore[arg-type]


def test_step_to_the_same_time_is_the_identity(path: NoisePath) -> None:
    t = times(path)
    x0, eps = draws(len(t))
    x_t = path.add_noise(x0, eps, t)
    scale = path.coeffs(t)[1].max().clamp_min(1.0)
    assert (path.step(x0 + 1.0, x_t, t, t) - x_t).abs().max() < 1e-10 * scale


def test_step_to_zero_gives_x0(path: NoisePath) -> None:
    t = times(path)
    x0, eps = draws(len(t))
    x_t = path.add_noise(x0, eps, t)
    guess = x0 + 0.5
    assert torch.equal(path.step(guess, x_t, t, torch.zeros_like(t)), guess)


def test_step_keeps_x0_and_eps(path: NoisePath) -> None:
    """Stepping with the true x0 stays on the line x0, eps; so two steps equal one."""
    t = times(path)[times(path) > 0.5]
    x0, eps = draws(len(t))
    u, s = 0.7 * t, 0.3 * t
    x_t = path.add_noise(x0, eps, t)
    via_u = path.step(x0, path.step(x0, x_t, t, u), u, s)
    scale = max(1.0, float(path.coeffs(t)[1].max()))
    assert (via_u - path.add_noise(x0, eps, s)).abs().max() < 1e-10 * scale
    assert (via_u - path.step(x0, x_t, t, s)).abs().max() < 1e-10 * scale


def test_vp_step_is_euler_in_rectified_flow_coordinates() -> None:
    """x_s / c_s = x_t / c_t + (t_s - t_t) v with c = alpha + sigma, t = sigma / c, v = eps - x0."""
    path = sd_path()
    t = torch.tensor([1.0, 0.9, 0.5, 0.25, 0.25], dtype=torch.float64)
    s = torch.tensor([0.75, 0.4, 0.25, 0.01, 0.0], dtype=torch.float64)
    x_t, out = draws(len(t), seed=3)
    pred_x0, pred_eps = path.to_x0(out, x_t, t, "eps"), out
    (a_t, s_t), (a_s, s_s) = path.coeffs(t), path.coeffs(s)
    c_t, c_s = (a_t + s_t).view(-1, 1, 1, 1), (a_s + s_s).view(-1, 1, 1, 1)
    rf_t, rf_s = s_t.view(-1, 1, 1, 1) / c_t, s_s.view(-1, 1, 1, 1) / c_s
    euler = c_s * (x_t / c_t + (rf_s - rf_t) * (pred_eps - pred_x0))
    assert (path.step(pred_x0, x_t, t, s) - euler).abs().max() < 1e-12


def test_flow_step_is_euler() -> None:
    path, t, s = FlowPath(), torch.tensor([1.0, 0.6]).double(), torch.tensor([0.5, 0.2]).double()
    x_t, flow = draws(2)
    expected = x_t + (s - t).view(-1, 1, 1, 1) * flow
    assert (path.step(path.to_x0(flow, x_t, t, "flow"), x_t, t, s) - expected).abs().max() < 1e-14


def gains(path: NoisePath, t: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ratio, std) of renoise, read off by feeding unit signals."""
    one, zero = torch.ones(len(t), 1, 1, 1).double(), torch.zeros(len(t), 1, 1, 1).double()
    ratio = path.renoise(one, t, s, zero).flatten()
    return ratio, path.renoise(zero, t, s, one).flatten()


def test_renoise_keeps_the_marginal(path: NoisePath) -> None:
    t = times(path)[:-1:3]
    s = t + (1.0 - t) * torch.linspace(0.0, 1.0, len(t), dtype=torch.float64)
    ratio, std = gains(path, t, s)
    (a_t, s_t), (a_s, s_s) = path.coeffs(t), path.coeffs(s)
    variance = ratio**2 * s_t**2 + std**2
    assert ((variance - s_s**2) / s_s**2).abs().max() < 1e-10
    assert (ratio * a_t - a_s).abs().max() < 1e-12


def test_renoise_refuses_cleaner_times() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="expected s >= t"):
        FlowPath().renoise(x, torch.tensor([0.5]), torch.tensor([0.4]), x)


def test_ddim_eta_variance() -> None:
    """std^2 = eta^2 (1 - abar_s) / (1 - abar_t) (1 - abar_t / abar_s), DDIM Eq. 16."""
    path, eta = sd_path(), 0.6
    t = torch.tensor([1.0, 0.75, 0.5, 0.25]).double()
    s = torch.tensor([0.75, 0.5, 0.25, 0.1]).double()
    zero, one = torch.zeros(4, 1, 1, 1).double(), torch.ones(4, 1, 1, 1).double()
    std = path.step(zero, zero, t, s, eta, one).flatten()
    abar_t, abar_s = path.coeffs(t)[0] ** 2, path.coeffs(s)[0] ** 2
    expected = eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    assert (std**2 - expected).abs().max() < 1e-12
    # with x_t = sigma_t eps and x0 = 0 the whole variance is sigma_s^2
    mean = path.step(zero, path.coeffs(t)[1].view(-1, 1, 1, 1) * one, t, s, eta, zero).flatten()
    assert (mean**2 + std**2 - path.coeffs(s)[1] ** 2).abs().max() < 1e-12


def test_step_with_eta_asks_for_noise() -> None:
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="expected noise with eta > 0"):
        FlowPath().step(x, x, torch.tensor([0.5]), torch.tensor([0.4]), eta=1.0)


@pytest.mark.parametrize(
    ("index", "abar", "alpha", "sigma", "ratio"),
    [
        (999, 0.00466, 0.0683, 0.9977, 14.61),
        (749, 0.0566, 0.238, 0.971, 4.08),
        (499, 0.2777, 0.527, 0.850, 1.613),
        (399, 0.426, 0.653, 0.758, 1.16),
        (249, 0.6754, 0.822, 0.570, 0.693),
        (0, 0.99915, 0.99957, 0.02915, 0.0292),
    ],
)
def test_stable_diffusion_anchor_values(
    index: int, abar: float, alpha: float, sigma: float, ratio: float
) -> None:
    path = sd_path()
    a, s = (float(c) for c in path.coeffs(path.time_of(index).view(1)))
    assert a**2 == pytest.approx(abar, rel=5e-3)
    assert a == pytest.approx(alpha, rel=2e-3)
    assert s == pytest.approx(sigma, rel=2e-3)
    assert s / a == pytest.approx(ratio, rel=5e-3)


def test_zero_terminal_snr_is_exact() -> None:
    alpha, sigma = zero_snr_path().coeffs(torch.ones(1).double())
    assert float(alpha) == 0.0
    assert float(sigma) == 1.0
    assert math.isinf(float(zero_snr_path().log_snr(torch.ones(1).double())))


def test_table_index_and_time_are_inverse() -> None:
    path = sd_path()
    index = torch.arange(1000)
    assert torch.equal(path.model_time(path.time_of(index)), index.double())
    grid = torch.tensor(uniform_grid(4), dtype=torch.float64)
    assert path.model_time(grid).tolist() == [999.0, 749.0, 499.0, 249.0]
    assert path.snap(torch.tensor([0.0, 0.33333, 0.66666, 1.2])).tolist() == [
        0.001, 0.333, 0.667, 1.0,
    ]  # fmt: skip


def test_vp_interpolates_between_entries() -> None:
    path = sd_path()
    low, mid, high = (path.coeffs(torch.tensor([t]).double())[1] for t in (0.5, 0.5005, 0.501))
    assert low < mid < high
    assert float(sum(c**2 for c in path.coeffs(torch.tensor([0.5005]).double()))) == pytest.approx(
        1.0, abs=1e-14
    )


def test_angle_of_a_table_is_inverted_between_its_entries() -> None:
    path = sd_path()
    t = torch.tensor([0.0, 0.0004, 0.001, 0.0015, 0.42042, 0.9999, 1.0], dtype=torch.float64)
    alpha, sigma = path.coeffs(t)
    found = path.time_of_angle(torch.atan2(sigma, alpha))
    torch.testing.assert_close(found, t, rtol=0, atol=1e-9)
    beyond = torch.tensor([math.pi / 2], dtype=torch.float64)  # noisier than the table's last entry
    assert path.time_of_angle(beyond).tolist() == [1.0]


def test_a_circle_s_angle_grows_evenly_up_to_sigma_max() -> None:
    """Diffusers' CosineDPMSolver: sigma = tan(phi); the network is told 2 phi / pi."""
    path = TrigPath(sigma_max=500.0, num_steps=10)
    t = torch.tensor([0.0, 0.3, 1.0, 1.7], dtype=torch.float64)  # beyond 1 there is no more noise
    phi = torch.tensor([0.0, 0.3, 1.0, 1.0], dtype=torch.float64) * math.atan(500.0)
    alpha, sigma = path.coeffs(t)
    torch.testing.assert_close(torch.stack([alpha, sigma]), torch.stack([phi.cos(), phi.sin()]))
    assert float(sigma[2] / alpha[2]) == pytest.approx(500.0, rel=1e-9)
    torch.testing.assert_close(path.model_time(t[:3]), 2.0 * phi[:3] / math.pi)
    torch.testing.assert_close(path.time_of(path.model_time(t[:3])), t[:3])
    entries = torch.arange(1, 11, dtype=torch.float64) / 10
    assert path.entry(entries).tolist() == pytest.approx([*range(10)])
    table = VPPath.coeffs(path, entries)  # what stock VP schedulers are given
    torch.testing.assert_close(torch.stack(table), torch.stack(path.coeffs(entries)))


def test_vp_refuses_a_growing_table() -> None:
    with pytest.raises(ValueError, match="decreasing alphas_cumprod"):
        VPPath(torch.tensor([0.5, 0.9]))


def test_model_time_of_flow_and_ve() -> None:
    assert FlowPath(1000).model_time(torch.tensor([0.25])).tolist() == [250.0]
    ve = VEPath(sigma_max=80.0, rho=7.0)
    assert float(ve.model_time(torch.ones(1))) == pytest.approx(0.25 * math.log(80.0))
    assert float(ve.time_of_sigma(ve.coeffs(torch.tensor([0.3]).double())[1])) == pytest.approx(0.3)
    noise = torch.ones(1, 1, 1, 1)
    assert float(ve.prior(noise)) == 80.0
    assert float(ve.prior(2 * noise)) == 160.0
    assert FlowPath().prior(noise) is noise


def test_half_inputs_are_computed_in_float32() -> None:
    x = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    assert FlowPath().add_noise(x, x, torch.tensor([0.3])).dtype == torch.float32


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.5, 0.99, 1.0])
def test_travel_starts_at_the_index_stock_tcd_starts_at(gamma) -> None:
    """Its rule at every index; index 0 is clean data here. At 0.3, 374 goes to 261, not 261.5."""
    path, n = sd_path(), torch.arange(1000)
    stock = torch.floor((1 - gamma) * n).long()
    found = path.before_travel((n + 1).double() / 1000, gamma)
    assert (found * 1000 - 1).round().clamp_min(0).long().tolist() == stock.tolist()
    assert torch.equal(found == 0, stock == 0)


def test_travel_starts_at_the_scaled_time_on_continuous_paths() -> None:
    t = torch.tensor([0.3, 0.875]).double()
    assert torch.equal(FlowPath().before_travel(t, 0.25), 0.75 * t)
    for path in (sd_path(), FlowPath(), VEPath()):
        assert torch.equal(path.before_travel(t, 0.0), t)


@pytest.mark.parametrize("start", [1.0, 0.4])
def test_the_line_to_the_prior_ends_there_and_is_one_line(path: NoisePath, start: float) -> None:
    x0, noise = draws(4)
    t = torch.tensor([0.2, 0.3, start, 1.0], dtype=torch.float64)
    x_t, eps = path.line_to_prior(x0, noise, t, start)
    prior = path.prior(noise)
    alpha, sigma = (float(c[0]) for c in path.coeffs(torch.tensor([start], dtype=torch.float64)))
    assert (alpha * x0 + sigma * eps - prior).abs().max() < 1e-10 * sigma
    assert torch.equal(x_t[2:], prior[2:]), "from `start` on the prior itself"
    for row in (0, 1):
        a, s = (float(c[row]) for c in path.coeffs(t))
        assert (x_t[row] - (a * x0[row] + s * eps[row])).abs().max() < 1e-10


def test_pure_noise_is_trained_at_from_time_1_alone(path: NoisePath) -> None:
    x0, noise = draws(4)
    t = torch.tensor([1.0, 1.0 - 1e-9, 0.999, 0.3], dtype=torch.float64)
    x_t, prior = path.noised(x0, noise, t), path.prior(noise)
    assert torch.equal(x_t[:2], prior[:2])
    assert torch.equal(x_t[2:], path.add_noise(x0, noise, t)[2:])
    assert (x_t[2] - prior[2]).abs().max() > 1e-4
