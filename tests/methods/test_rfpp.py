"""2-rectified flow++: time law, robust and perceptual losses, anchored sampler, in closed form."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from methods.test_reflow import FLOW, MU, PATHS, VP, Ctx64, Straight, pairs, pure_noise_rows

from stepdistill.config.layers import merge
from stepdistill.config.run import RunConfig
from stepdistill.core.method import Setting
from stepdistill.core.path import VEPath, expand, flow_time
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.times import u_shaped_times
from stepdistill.core.types import Cond
from stepdistill.export.schedulers import stock_sampler
from stepdistill.losses.regression import sample_huber
from stepdistill.methods.rfpp import RFPP, RFPPConfig
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher

CONFIG = Path(__file__).parents[2] / "configs" / "methods" / "rfpp.yaml"


def squares(images, by):
    """A distance of images with a closed form."""
    return (images - by).square().flatten(1).sum(1)


def make(path=FLOW, **options) -> RFPP:
    return RFPP(RFPPConfig(**options), Setting(path))


def losses(method, student, data, seed=1):
    (phase,) = method.phases(0)
    nets = AnalyticNets({"student": student}, scorers={"lpips": squares})
    return phase.loss(nets, data, Ctx64(seed=seed))


# ------------------------------------------------------------------------------------- time law
def test_times_are_u_shaped_and_symmetric():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = u_shaped_times(u, 4.0)
    assert abs(float(t.mean()) - 0.5) < 1e-6
    outer = [float((t < 0.1).double().mean()), float((t > 0.9).double().mean())]
    exact = (math.exp(0.4) - 1 + math.exp(4) - math.exp(3.6)) / (2 * (math.exp(4) - 1))
    assert abs(exact - 0.173) < 0.005
    assert all(abs(mass - exact) < 1e-4 for mass in outer)
    centre = float(((t > 0.45) & (t < 0.55)).double().mean())
    # 2 cosh(at) would put 33% into the last decile and 1.5% into the first
    inner = (math.exp(2.2) - math.exp(1.8)) / (math.exp(4) - 1)
    torch.testing.assert_close(centre, inner, rtol=0, atol=1e-4)


def test_times_fill_their_range():
    ends = u_shaped_times(torch.tensor([0.0, 0.5 - 1e-16, 0.5, 1 - 1e-16]), 4.0, 1e-5, 1 - 1e-5)
    torch.testing.assert_close(float(ends.min()), 1e-5, rtol=0, atol=1e-9)
    torch.testing.assert_close(float(ends.max()), 1 - 1e-5, rtol=0, atol=1e-9)


def test_training_times_follow_the_law_and_a_table_clamps_them():
    student, method = Straight(FLOW), make(perceptual="none")
    losses(method, student, pairs(4096))
    t = student.seen[0][1]
    assert abs(float((t < 0.1).double().mean()) - 0.173) < 0.02
    student = Straight(VP)
    losses(make(VP, perceptual="none"), student, pairs(4096))
    index = VP.model_time(student.seen[0][1])
    assert (int(index.min()), int(index.max())) == (0, 999)


def test_an_edm_network_is_told_the_noise_that_its_answer_is_divided_by():
    """D = x - sigma F of a network that is told sigma: flow = (x_rf - D) / tau is F off x_rf only
    where sigma is the state's own; below sigma_min it would be 200 times F at tau = 1e-5."""
    path = VEPath()

    class Told(Straight):
        def posterior_mean(self, x_t, t, cond):
            self.seen.append((x_t, t))
            told = (self.path.model_time(t) / self.path.time_scale).exp()
            return x_t - expand(told, x_t)  # F = 1

    student, data = Told(path), pairs(4096)
    method = make(path, perceptual="none")
    losses(method, student, data)
    x_t, t = student.seen[0]
    sigma = path.coeffs(t)[1]
    assert sigma.min() >= 0.002 * (1 - 1e-9)
    assert sigma.max() == 80.0
    pred = student(x_t, t, data.cond)
    exact = 1.0 - (x_t - expand(sigma, x_t))  # eps - x0, with eps = F
    error = (pred.flow - exact).square().mean().sqrt()
    assert error < 1e-6


@pytest.mark.parametrize("path", ["vp", "ve"])
def test_training_at_the_first_time_sees_what_sampling_starts_from(path):
    for perceptual in ("none", "inverse_t"):
        method, student = make(PATHS[path], perceptual=perceptual), Straight(PATHS[path])
        inputs, first = pure_noise_rows(method, student, pairs(4096))
        assert len(inputs) > 30
        assert torch.equal(inputs, first)


# --------------------------------------------------------------------------------------- losses
def test_huber_is_quadratic_for_small_errors_and_linear_for_large_ones():
    target, d = torch.zeros(2, 2, 2, 2, dtype=torch.float64), 8
    h = 0.00054 * d
    small, large = 1e-3 * h, 1e4 * h
    error = torch.tensor([small, large], dtype=torch.float64) / math.sqrt(d)
    found = sample_huber(expand(error, target) + target, target)
    torch.testing.assert_close(found[0].item(), small**2 / (2 * h * d), rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1].item(), (large - h) / d, rtol=1e-4, atol=0)


@pytest.mark.parametrize("perceptual", ["none", "constant", "inverse_t"])
@pytest.mark.parametrize("path", ["vp", "flow"])
def test_loss_is_zero_at_the_straight_field(path, perceptual):
    method = make(PATHS[path], perceptual=perceptual)
    assert losses(method, Straight(PATHS[path]), pairs()).total < 1e-12


@pytest.mark.parametrize("perceptual", ["none", "constant", "inverse_t"])
def test_loss_and_gradient_off_the_solution_have_their_closed_form(perceptual):
    """x0 off by theta tau, so flow by -theta: |dv|^2 = d theta^2, |dx0|^2 = d (theta tau)^2."""
    theta = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    student = Straight(FLOW, error=lambda t: theta * t)
    total = losses(make(perceptual=perceptual), student, pairs(64)).total
    total.backward()
    tau, d = student.seen[0][1], 8
    free = theta.detach().clone().requires_grad_(True)
    huber = ((d * free**2 + (0.00054 * d) ** 2).sqrt() - 0.00054 * d) / d
    lpips = d * (free * tau) ** 2
    expected = {
        "none": huber,
        "constant": ((1 - tau) * huber + lpips).mean(),
        "inverse_t": ((1 - tau) * huber + lpips / tau).mean(),
    }[perceptual]
    expected.backward()
    torch.testing.assert_close(total.item(), expected.item(), rtol=1e-9, atol=0)
    torch.testing.assert_close(theta.grad.item(), free.grad.item(), rtol=1e-9, atol=0)
    assert theta.grad > 0


def test_pure_noise_has_no_huber_part():
    options = {"t_range": (1 - 1e-12, 1.0)}
    student = Straight(FLOW, error=lambda t: 0.1 + 0 * t)
    total = losses(make(**options), student, pairs(64)).total
    torch.testing.assert_close(total.item(), 8 * 0.01, rtol=1e-6, atol=0)


def test_permuted_pairs_cost_more():
    for perceptual in ("none", "constant", "inverse_t"):
        method = make(perceptual=perceptual, t_range=(0.1, 0.9))
        paired, mixed = (
            losses(method, Straight(FLOW), pairs(512, permuted=p)).total for p in (False, True)
        )
        assert paired < 1e-12 < 0.1 < mixed


def test_edm_wrapper_gives_the_velocity_back_exactly():
    """v = (x_rf - D) / tau at x_rf = x / (1 + sigma), and D = x_rf - tau v."""
    path, generator = VEPath(), torch.Generator().manual_seed(0)
    sigma = torch.tensor([0.01, 0.5, 3.0, 60.0], dtype=torch.float64)
    t = path.time_of_sigma(sigma)
    x, denoised = (torch.randn(4, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    tau = expand(flow_time(path, t), x)
    flow = path.convert(denoised, x, t, "x0", "flow")
    x_rf = x / (1 + sigma[:, None])
    torch.testing.assert_close(flow, (x_rf - denoised) / tau, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path.convert(flow, x, t, "flow", "x0"), denoised)


# -------------------------------------------------------------------------------------- sampler
@pytest.mark.parametrize("path", ["flow", "vp"])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_anchored_sampler_is_euler_where_the_field_is_straight(num_steps, path):
    data, student = pairs(64), Straight(PATHS[path])
    grid = make(PATHS[path]).sampler(num_steps).times
    euler, anchored = (
        sample_x0(student, SamplerSpec(grid, kind), data.noise, data.cond)
        for kind in ("ode", "anchored")
    )
    torch.testing.assert_close(anchored, data.x0)
    if path == "flow":
        torch.testing.assert_close(anchored, euler)


def test_anchored_sampler_returns_to_the_first_noise():
    """On a curved field: x_(1/2) = (x0_1 + z) / 2, by hand; the first step is Euler's."""
    data, teacher = pairs(64), GaussianTeacher(FLOW, 0.5)
    half = torch.full((64,), 0.25, dtype=torch.float64)
    mid = 0.5 * MU + 0.5 * data.noise  # one step from t = 1 answers the mean
    x0 = teacher(mid, 2 * half, data.cond).x0
    expected = teacher(0.75 * x0 + 0.25 * data.noise, half, data.cond).x0
    grid = (1.0, 0.5, 0.25)
    found = sample_x0(teacher, SamplerSpec(grid, "anchored"), data.noise, data.cond)
    torch.testing.assert_close(found, expected)
    euler = sample_x0(teacher, SamplerSpec(grid, "ode"), data.noise, data.cond)
    assert (found - euler).abs().max() > 0.01


@pytest.mark.parametrize("path", ["flow", "vp", "ve"])
def test_the_anchored_sampler_begins_as_euler(path):
    """On a curved field the two make one image up to two steps, and others beyond."""
    data, teacher = pairs(64), GaussianTeacher(PATHS[path], 0.5)
    method = make(PATHS[path], sampler="anchored", num_steps=4)
    for num_steps in (1, 2, 3):
        grid = method.sampler(num_steps).times
        anchored, euler = (
            sample_x0(teacher, SamplerSpec(grid, kind), data.noise, data.cond)
            for kind in ("anchored", "ode")
        )
        same = torch.allclose(anchored, euler, rtol=0, atol=1e-9)
        assert same == (num_steps <= 2) == (method.sampler(num_steps).kind == "ode")


def released_heun(student, z, times, sampler):
    """sample_ode_generative of the released code with solver heun, from t = 1; (calls, x0)."""
    calls, z1, cond, schedule = 0, z, Cond({"mean": torch.full_like(z, MU)}), [*times, 0.0]

    def model(x, t):
        nonlocal calls
        calls += 1
        return student(x, torch.full((len(x),), t, dtype=torch.float64), cond).flow

    for i, (t, later) in enumerate(pairwise(schedule)):
        vt = model(z, t)
        x0hat = z - vt * t
        if i < len(times) - 1:
            default = z + vt * (later - t)
            z_next = default if sampler == "ode" else (1 - later) * x0hat + later * z1
            vt = (vt + model(z_next, later)) / 2
            x0hat = z - vt * t
        z = z + vt * (later - t) if sampler == "ode" else (1 - later) * x0hat + later * z1
    return calls, z


@pytest.mark.parametrize("kind", ["ode", "anchored"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4])
def test_heuns_sampler_is_the_released_one(num_steps, kind):
    data, teacher = pairs(64), GaussianTeacher(FLOW, 0.5)
    option = {"ode": "euler"}.get(kind, kind)
    spec = make(sampler=option, heun=True).sampler(num_steps)
    calls, expected = released_heun(teacher, data.noise, spec.times, kind)
    assert calls == spec.num_calls == 2 * num_steps - 1
    found = sample_x0(teacher, spec, data.noise, data.cond)
    torch.testing.assert_close(found, expected)
    euler = sample_x0(teacher, dataclasses.replace(spec, heun=False), data.noise, data.cond)
    assert torch.allclose(found, euler, rtol=0, atol=1e-3) == (num_steps == 1)


@pytest.mark.parametrize("sampler", ["euler", "anchored"])
@pytest.mark.parametrize("path", PATHS)
def test_heun_is_exact_where_the_field_is_straight(path, sampler):
    data, student = pairs(64), Straight(PATHS[path])
    spec = make(PATHS[path], sampler=sampler, heun=True).sampler(4)
    found = sample_x0(student, spec, data.noise, data.cond)
    torch.testing.assert_close(found, data.x0, rtol=0, atol=1e-9)
    assert len(student.seen) == 7


def test_heun_is_of_second_order():
    """On the Gaussian's own curved flow the error falls fourfold from 32 to 64 steps."""
    data, teacher = pairs(64), GaussianTeacher(FLOW, 0.5)
    errors = []
    for num_steps in (32, 64):
        found = sample_x0(teacher, make(heun=True).sampler(num_steps), data.noise, data.cond)
        errors.append((found - data.x0).abs().max().item())
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_more_steps_of_edm_are_refused_at_export_with_what_to_do():
    assert make(num_steps=4).sampler().kind == "ode"
    method = make(VEPath(), sampler="anchored", heun=True, num_steps=4)
    with pytest.raises(ValueError, match=r"anchored, heun True in 4 steps.*sampler: euler"):
        stock_sampler(None, VEPath(), method.sampler())


def test_shipped_config_is_valid():
    run = RunConfig(pretrained_model_name_or_path="m", **yaml.safe_load(CONFIG.read_text()))
    method = RFPP(RFPPConfig(**run.method_config), Setting(VP))
    spec = method.scorers()["lpips"]
    assert (spec.options["resize"], spec.options["pooling"]) == (224, "avg")
    assert make(perceptual="none").scorers() == {}
    with pytest.raises(ValueError, match="0 < low < high"):
        make(t_range=(0.0, 1.0))
    real = yaml.safe_load(CONFIG.with_name("rfpp_real.yaml").read_text())
    told = merge(yaml.safe_load(CONFIG.read_text()), real)
    later = RunConfig(pretrained_model_name_or_path="m", **told)
    assert (later.max_train_steps, later.method_config) == (5000, run.method_config)
