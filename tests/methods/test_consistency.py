"""Consistency distillation against exact flow maps of Gaussian teachers."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import LCMScheduler
from torch import Tensor

from stepdistill.config.run import RunConfig
from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, VEPath, VPPath, expand
from stepdistill.core.solvers import (
    boundary_coeffs,
    cd_boundary_coeffs,
    sample_x0,
    teacher_step,
)
from stepdistill.core.types import Batch, Cond
from stepdistill.methods import METHODS
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.consistency_config import ConsistencyConfig, GridGrowth, noise_ratio
from stepdistill.methods.grid import SolverGrid, drawn_times, heun_step
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
VP, FLOW, VE = VPPath.from_betas(BETAS), FlowPath(), VEPath()
PATHS = {"vp": VP, "flow": FLOW, "ve": VE}
SHAPE = (2, 2, 2)


def batch(bsz: int = 64, mean: float = 0.7, null: float = 0.0, std: float = 0.0) -> Batch:
    """Float64 samples of N(mean, std^2) with their condition."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(bsz, *SHAPE, generator=generator, dtype=torch.float64)

    def cond(value: float) -> Cond:
        return Cond({"mean": torch.full((bsz, *SHAPE), value, dtype=torch.float64)})

    return Batch(cond(mean), cond(null), SHAPE, x0=mean + std * noise)


class Ctx64(Ctx):
    """Float64 noise, so that residuals of 1e-12 can be told from rounding."""

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        return super().randn(shape).double()


class ExactStudent(AnalyticDenoiser):
    """x0 view whose boundary blend is the teacher's flow map to the grid's end, plus an error.

    error: (t, x_t) -> added to f. With guidance embedded, the mean is the guided one at w + 1.
    """

    def __init__(self, method: Consistency, std: float, error=None, kind="x0", guided=None):
        super().__init__(method.setting.path, kind)
        self.grid, self.std, self.error, self.guided = method.grid, std, error, guided
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def raw(self, x_t, t, cond, w, features):
        self.seen.append((x_t, t, w))
        mean = cond["mean"]
        if self.guided is not None:  # null mean is 0: the guided mean is g times the mean
            mean = mean * (self.guided if w is None else expand(w.double() + 1, mean))
        self._mean = Cond({"mean": mean})
        return super().raw(x_t, t, cond, w, features)

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        teacher = GaussianTeacher(self.path, self.std)
        f = teacher.flow_map(x_t, t, torch.full_like(t, self.grid.end), self._mean)
        if self.error is not None:
            f = f + self.error(expand(t, x_t))
        skip, out = torch.zeros_like(t), torch.ones_like(t)
        if self.grid.boundary == "lcm":
            skip, out = boundary_coeffs(self.path.model_time(t), self.grid.scale)
        elif self.grid.boundary == "cd":
            skip, out = cd_boundary_coeffs(self.path.coeffs(t)[1], self.path.sigma_min)
        return (f - expand(skip, f) * x_t) / expand(out, f).clamp_min(1e-12)


def make(path: NoisePath, shift: float = 1.0, **options) -> Consistency:
    options = {"guidance_range": (1.0, 1.0), "target": "self", **options}
    return Consistency(ConsistencyConfig(**options), Setting(path, "eps", shift))


def loss_of(method: Consistency, student: Denoiser, data: Batch, std: float, kind="x0") -> Tensor:
    nets = AnalyticNets({"teacher": GaussianTeacher(method.setting.path, std, kind)})
    nets._denoisers.update(student=student, target=student)
    (phase,) = method.phases(0)
    return phase.loss(nets, data, Ctx64(seed=1)).total


# ------------------------------------------------------------------- the loss at the solution
@pytest.mark.parametrize("boundary", ["auto", "none"])
@pytest.mark.parametrize("path", PATHS)
def test_point_mass_has_zero_loss_at_the_exact_map(path, boundary):
    method = make(PATHS[path], boundary=boundary)
    loss = loss_of(method, ExactStudent(method, std=0.0), batch(std=0.0), std=0.0)
    assert loss < 1e-18  # float64 rounding, times 14.6 of x0 on VP


@pytest.mark.parametrize(
    ("path", "shift", "solver", "order"),
    [
        ("flow", 1.0, "ddim", 2.0),
        ("flow", 3.0, "ddim", 2.0),
        ("vp", 1.0, "ddim", 2.0),
        ("vp", 1.0, "heun", 3.0),
        ("flow", 1.0, "heun", 2.5),  # the one Euler step to t = 0 is a share h of error h^4: h^5
    ],
)
def test_loss_at_the_exact_map_falls_with_the_solver_order(path, shift, solver, order):
    """l2 of a local error O(h^order): halving h divides the loss by 4^order."""
    losses = []
    for num_grid in (250, 500):
        method = make(PATHS[path], shift, num_grid=num_grid, solver=solver)
        student = ExactStudent(method, std=0.5)
        losses.append(loss_of(method, student, batch(4096, std=0.5), std=0.5))
    found = float((losses[0] / losses[1]).log() / torch.tensor(4.0).log())
    assert losses[1] > 0
    assert abs(found - order) < 0.25, (losses, found)


@pytest.mark.parametrize(("solver", "order"), [(teacher_step, 2), (heun_step, 3)])
@pytest.mark.parametrize("path", PATHS)
def test_local_error_of_the_teacher_step(path, solver, order):
    path, data = PATHS[path], batch(std=0.5)
    teacher, errors = GaussianTeacher(path, 0.5), []
    t = torch.full((64,), 0.6, dtype=torch.float64)
    x_t = path.add_noise(data.x0, Ctx64().randn(data.x0.shape), t)
    for h in (0.02, 0.01):
        x_s = solver(teacher, x_t, t, t - h, data.cond, None, 1.0)
        errors.append((x_s - teacher.flow_map(x_t, t, t - h, data.cond)).abs().max())
    found = float((errors[0] / errors[1]).log2())
    assert abs(found - order) < 0.2, (errors, found)


def test_heun_takes_the_euler_step_to_the_clean_end():
    data = batch(std=0.5)
    teacher, t = GaussianTeacher(FLOW, 0.5), torch.full((64,), 0.02).double()
    args = (teacher, data.x0, t, torch.zeros_like(t), data.cond, None, 1.0)
    assert torch.equal(heun_step(*args), teacher_step(*args))


def test_data_solver_steps_along_the_true_line_and_needs_no_teacher():
    """CT: x_s is the same x0 and noise at s, so a point mass gives zero without a teacher."""
    method = make(FLOW, solver="data")
    assert set(method.roles()) == {"student"}
    nets = AnalyticNets({"student": ExactStudent(method, std=0.0)})
    assert method.loss(nets, batch(std=0.0), Ctx64()).total < 1e-20


# ----------------------------------------------------------------------------------- guidance
def test_embedded_guidance_is_g_minus_one():
    """Teacher guided with sampled g: only a student told w = g - 1 knows the guided mean."""
    method = make(FLOW, guidance_range=(2.0, 9.0), embed_guidance=True)
    student = ExactStudent(method, std=0.0, guided=1.0)
    data = batch(std=0.0)
    assert loss_of(method, student, data, std=0.0) < 1e-10  # w travels as float32
    (_, _, w), (_, _, w_target) = student.seen
    assert torch.equal(w, w_target)
    assert 1.0 <= w.min() < 1.5  # g in [2, 9]: w in [1, 8]
    assert 7.5 < w.max() <= 8.0
    assert method.sampler().w == 7.5


def test_fixed_guidance_gives_the_guided_gaussian():
    """mu' = mu_u + g (mu_c - mu_u). The unguided map is self-consistent too, so only the last
    interval, whose target is the teacher's own end, tells it by ((g - 1) mu)^2."""
    method = make(FLOW, guidance_range=(3.0, 3.0), num_grid=10)
    data = batch(4096, mean=0.7, null=0.0, std=0.0)
    assert loss_of(method, ExactStudent(method, 0.0, guided=3.0), data, std=0.0) < 1e-20
    wrong = ExactStudent(method, 0.0, guided=1.0)
    last = Ctx64(seed=1).randint(0, 10, 4096) == 0
    share = float(last.double().mean())
    assert 0.05 < share < 0.2
    expected = share * (3.0 * 0.7 - 0.7) ** 2
    torch.testing.assert_close(float(loss_of(method, wrong, data, std=0.0)), expected)


# ------------------------------------------------------------------------- gradients and types
@pytest.mark.parametrize("path", ["flow", "vp"])
def test_gradient_off_the_solution_has_its_closed_form(path):
    """f = mu + theta t: loss = theta^2 E (t - s)^2 and d/dtheta = 2 theta E t (t - s), as the
    target carries no gradient. At s = end f is x itself, exactly mu: s counts as 0."""
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    method = make(PATHS[path], num_grid=10, boundary="none")
    student = ExactStudent(method, 0.0, error=lambda t: theta * t)
    data, n = batch(256, std=0.0), 256
    loss = loss_of(method, student, data, std=0.0)
    loss.backward()
    t, s = method.grid.pair(Ctx64(seed=1).randint(0, 10, n))
    torch.testing.assert_close(loss.item(), float(0.09 * ((t - s) ** 2).mean()))
    torch.testing.assert_close(float(theta.grad), float(2 * 0.3 * (t * (t - s)).mean()))


@pytest.mark.parametrize("path", ["flow", "vp"])
def test_gradient_is_zero_at_the_solution(path):
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    method = make(PATHS[path])
    student = ExactStudent(method, 0.0, error=lambda t: theta * t)
    loss_of(method, student, batch(std=0.0), std=0.0).backward()
    assert theta.grad.abs() < 1e-9


@pytest.mark.parametrize("boundary", ["auto", "none"])
@pytest.mark.parametrize("path", ["flow", "vp"])
def test_prediction_types_of_one_denoiser_give_one_loss(path, boundary):
    method = make(PATHS[path], boundary=boundary, guidance_range=(2.0, 5.0))
    data = batch(std=0.5)
    kinds = ("x0", "eps", "v", "flow") if path == "vp" else ("x0", "v", "flow")  # eps/0 at t = 1
    losses = []
    for kind in kinds:
        student = ExactStudent(method, 0.4, error=lambda t: 0.1 * t, kind=kind)
        losses.append(float(loss_of(method, student, data, std=0.5, kind=kind)))
    assert losses[0] > 1e-4
    torch.testing.assert_close(losses, [losses[0]] * len(kinds), rtol=1e-9, atol=0)


def test_target_sees_the_stepped_point_at_its_own_time():
    method = make(FLOW, shift=3.0)
    student = ExactStudent(method, 0.5)
    data = batch(std=0.5)
    loss_of(method, student, data, std=0.5)
    (x_t, t, _), (x_s, s, _) = student.seen
    expected_t, expected_s = method.grid.pair(Ctx64(seed=1).randint(0, 50, 64))
    assert torch.equal(t, expected_t)
    assert torch.equal(s, expected_s)
    assert torch.equal(
        x_s, teacher_step(GaussianTeacher(FLOW, 0.5), x_t, t, s, data.cond, data.null, 1.0)
    )


def test_ema_target_is_called_and_updated():
    method = make(FLOW, target="ema", ema_decay=0.9)
    assert method.roles()["target"].ema_of == "student"
    student, target = (ExactStudent(method, 0.5) for _ in range(2))
    nets = AnalyticNets(
        {"teacher": GaussianTeacher(FLOW, 0.5), "student": student, "target": target}
    )
    method.loss(nets, batch(), Ctx64())
    method.after(nets, 0)
    assert (len(student.seen), len(target.seen)) == (1, 1)
    assert nets.ema_calls == [("target", 0.9)]
    make(FLOW, target="self").after(nets, 0)
    assert len(nets.ema_calls) == 1


def test_losses_differ_as_their_distances():
    data = batch(std=0.5)
    values = {}
    for name in ("l2", "l1", "huber"):
        method = make(FLOW, loss=name, huber_c=1e-3, num_grid=5)
        values[name] = float(loss_of(method, ExactStudent(method, 0.5), data, std=0.5))
    assert values["l1"] - 1e-3 < values["huber"] < values["l1"]
    assert values["l2"] < values["l1"] ** 1.5


# ------------------------------------------------------------------------ boundary and sampler
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("boundary", ["auto", "none"])
@pytest.mark.parametrize("path", PATHS)
def test_boundary_is_bit_exact(path, boundary, kind):
    method = make(PATHS[path], boundary=boundary)
    x = torch.randn(3, *SHAPE)
    t = torch.full((3,), method.grid.end, dtype=torch.float64)
    path_end = GaussianTeacher(PATHS[path], 0.5)
    path_end.kind = kind
    path_end.raw = lambda x_t, *_: (torch.randn_like(x_t), {})  # whatever the network says
    f = method.grid.blend(path_end(x, t, batch(3).cond))
    assert torch.equal(f, x)


def test_cd_coefficients_equal_the_paper_form_on_the_raw_edm_network():
    """c_skip(s - eps) x + c_out(s - eps) F with x0 = c_skip x + c_out F (consistency_models)."""
    sigma, low, data = torch.tensor([0.002, 0.5, 80.0]).double(), 0.002, 0.5
    x, raw = torch.randn(3).double(), torch.randn(3).double()
    root = (sigma**2 + data**2).sqrt()
    x0 = data**2 / root**2 * x + sigma * data / root * raw
    paper = data**2 / ((sigma - low) ** 2 + data**2) * x + (sigma - low) * data / root * raw
    skip, out = cd_boundary_coeffs(sigma, low)
    torch.testing.assert_close(skip * x + out * x0, paper, rtol=1e-12, atol=1e-12)


def test_lcm_blend_equals_the_stock_scheduler():
    scheduler = LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    method, teacher = make(VP), GaussianTeacher(VP, 0.5, "eps")
    scheduler.set_timesteps(4, original_inference_steps=50)
    x = torch.randn(1, *SHAPE)
    for t, index in zip(method.sampler(4).times, scheduler.timesteps, strict=True):
        pred = teacher(x, torch.tensor([t]).double(), batch(1).cond)
        _, stock = scheduler.step(pred.raw.float(), index, x, return_dict=False)
        torch.testing.assert_close(method.grid.blend(pred).float(), stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (1, [999]),
        (2, [999, 499]),
        (4, [999, 759, 499, 259]),
        (8, [999, 879, 759, 639, 499, 379, 259, 139]),
    ],
)
def test_sampler_visits_the_known_lcm_timesteps(num_steps, expected):
    times = torch.tensor(make(VP).sampler(num_steps).times, dtype=torch.float64)
    assert VP.model_time(times).tolist() == expected


def test_sampler_strides_evenly_where_no_table_fixes_the_scheduler():
    """The stride of LCM's first pipeline, K // N: the one that flow schedulers' configs reach."""
    grid = make(FLOW, shift=3.0).grid
    for num_steps in (1, 2, 3, 4, 7, 50):
        starts = grid.starts[[49 - i * (50 // num_steps) for i in range(num_steps)]]
        assert grid.visit(num_steps) == tuple(starts.tolist())


@pytest.mark.parametrize("num_grid", [10, 40, 50, 100])
def test_sampler_visits_what_the_stock_scheduler_visits(num_grid):
    scheduler = LCMScheduler()
    for num_steps in range(1, min(num_grid, 25) + 1):
        scheduler.set_timesteps(num_steps, original_inference_steps=num_grid)
        spec = make(VP, num_grid=num_grid).sampler(num_steps)
        times = torch.tensor(spec.times, dtype=torch.float64)
        assert VP.model_time(times).tolist() == scheduler.timesteps.tolist(), num_steps


def test_grids():
    lcm = SolverGrid(Setting(VP), 50)
    assert VP.model_time(lcm.starts).tolist() == list(range(19, 1000, 20))
    assert VP.model_time(lcm.stops).tolist() == [0, *range(19, 980, 20)]
    flow = SolverGrid(Setting(FLOW, "flow", 3.0), 4)
    torch.testing.assert_close(flow.starts.tolist(), [0.5, 0.75, 0.9, 1.0])
    torch.testing.assert_close(flow.stops.tolist(), [0.0, 0.5, 0.75, 0.9])
    # CD's Karras grid: 40 points from sigma_min 0.002 to 80, rho 7
    ve = SolverGrid(Setting(VE), 39)
    karras = (0.002 ** (1 / 7) + torch.arange(40) / 39 * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    torch.testing.assert_close(VE.coeffs(ve.starts)[1].float(), karras[1:], rtol=1e-4, atol=0)
    torch.testing.assert_close(VE.coeffs(ve.stops)[1].float(), karras[:-1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("path", ["flow", "vp"])
def test_exact_student_samples_the_data_in_any_number_of_steps(path):
    """Point mass: every number of steps returns the mean; VP by LCM's f, which keeps 0.03 noise."""
    method = make(PATHS[path], boundary="none")
    data = batch(std=0.0)
    for num_steps in (1, 2, 4):
        x0 = sample_x0(
            ExactStudent(method, 0.0),
            method.sampler(num_steps),
            torch.randn_like(data.x0),
            data.cond,
            fresh_noise=lambda i: torch.randn_like(data.x0),
        )
        torch.testing.assert_close(x0, data.x0, rtol=0, atol=1e-9)


def test_cd_is_sampled_by_its_own_map_from_sigma_min():
    """f(x, t), then noise of variance sigma^2 - sigma_min^2 (consistency_models, Karras steps)."""
    method, data = make(VE, num_grid=40), batch(4, std=0.5)
    spec = method.sampler(40)
    assert (spec.boundary_sigma, spec.boundary_scale) == (VE.sigma_min, None)
    student = GaussianTeacher(VE, 0.5)
    noise, fresh = torch.randn(2, *data.x0.shape, dtype=torch.float64).unbind(0)
    x0 = sample_x0(student, spec, noise, data.cond, fresh_noise=lambda i: fresh)
    x = VE.prior(noise)
    for t, s in zip(spec.times, (*spec.times[1:], method.grid.end), strict=True):
        f = method.grid.blend(student(x, torch.full((4,), t, dtype=torch.float64), data.cond))
        sigma = VE.coeffs(torch.tensor(s, dtype=torch.float64))[1]
        x = f + (sigma**2 - VE.sigma_min**2).clamp_min(0).sqrt() * fresh
    torch.testing.assert_close(x0, f, rtol=0, atol=1e-12)


def test_sampler_spec_facts():
    spec = make(VP, guidance_range=(4.0, 16.0)).sampler()
    assert (spec.kind, spec.num_steps, spec.boundary_scale, spec.w) == ("renoise", 4, 10.0, None)
    assert len(spec.trained_times) == 50
    assert spec.guidance == 1.0
    assert make(FLOW).sampler().boundary_scale is None
    with pytest.raises(ValueError, match="1 to 50"):
        make(VP).sampler(51)
    with pytest.raises(ValueError, match="1 to 50"):
        make(VP).sampler(0)


# ------------------------------------------------------------------------ perceptual distance
def test_lpips_judges_decoded_estimate_and_target_and_trains_the_estimate_alone():
    calls = []

    def judge(images: Tensor, by: Tensor) -> Tensor:
        calls.append((images, by))
        return (images - by).abs().flatten(1).mean(1)

    method = make(FLOW, loss="lpips")
    student = ExactStudent(method, 0.5, lambda t: 0.1 * t)
    teacher = GaussianTeacher(FLOW, 0.5)
    nets = AnalyticNets({"teacher": teacher, "student": student}, scorers={"lpips": judge})
    nets.images = lambda latents: 2.0 * latents  # type: ignore[method-assign]
    data = batch(std=0.5)
    total = method.loss(nets, data, Ctx64(seed=1)).total
    plain = loss_of(make(FLOW, loss="l1"), student, data, 0.5)
    assert total.item() == pytest.approx(2.0 * plain.item(), rel=1e-6)
    assert not calls[0][1].requires_grad
    options = method.scorers()["lpips"].options
    assert (options["resize"], options["resize_below"], options["pooling"]) == (224, 256, "avg")
    assert make(FLOW).scorers() == {}


# -------------------------------------------------------------------------------- growing grid
def test_grid_points_follow_the_paper_s_square_root_law():
    growth = GridGrowth(start=2, steps=800_000)
    assert growth.intervals(0, 150) == 1
    assert growth.intervals(800_000, 150) == growth.intervals(10**6, 150) == 150
    half = (0.5 * (151**2 - 4) + 4) ** 0.5  # 106.8 at k = K / 2
    assert growth.intervals(400_000, 150) == 106 == int(half)
    seen = [growth.intervals(k, 150) for k in range(0, 800_001, 1000)]
    assert all(a <= b for a, b in pairwise(seen))
    assert set(range(20, 151)) <= set(seen)


def test_target_decay_follows_the_grid():
    """consistency_models' exp(-c / scales), c = -s0 ln mu0, scales before its + 1: intervals."""
    config = ConsistencyConfig(num_grid=150, growth=GridGrowth(start=2, steps=100), ema_decay=0.9)
    assert config.target_decay(0) == pytest.approx(0.9**2), "one interval, s0 = 2"
    assert config.target_decay(100) == pytest.approx(0.9 ** (2 / 150))
    assert ConsistencyConfig(ema_decay=0.9).target_decay(50) == 0.9


@pytest.mark.parametrize("path", ["flow", "ve"])
def test_the_loss_draws_from_the_grid_of_its_step(path):
    method = make(PATHS[path], solver="data", growth={"start": 2, "steps": 10}, num_grid=20)
    visited = []
    for step in (0, 5, 10):
        student = ExactStudent(method, std=0.0)
        nets = AnalyticNets({"student": student})
        method.loss(nets, batch(256), Ctx64(seed=1, step=step))
        visited.append(len(student.seen[0][1].unique()))
    assert visited == [1, 14, 20]
    assert method.sampler(4).trained_times == tuple(method.grid.starts.flip(0).tolist())


@pytest.mark.parametrize("path", PATHS)
def test_a_run_cut_short_is_sampled_on_the_grid_it_had_grown_to(path):
    method = make(PATHS[path], solver="data", growth={"start": 2, "steps": 10}, num_grid=20)
    assert method.sampler_at(0, 10) == method.sampler() == method.sampler_at(11, 11)
    first, later = method.sampler_at(1, 10), method.sampler_at(6, 10)
    assert first.times == (1.0,), "one interval at the first update"
    assert later.trained_times == tuple(method.grid_at(5).starts.flip(0).tolist())
    assert (later.num_steps, len(method.sampler_at(6, 10, 5).times)) == (4, 5)
    with pytest.raises(ValueError, match="1 to 1 "):
        method.sampler_at(1, 10, 4)
    assert make(PATHS[path]).sampler_at(1, 10) == make(PATHS[path]).sampler()


def test_a_growing_grid_on_a_table_takes_its_divisors():
    method = make(VP, solver="data", growth={"start": 2, "steps": 100}, num_grid=200)
    sizes = [len(method.grid_at(step).starts) for step in range(101)]
    assert sizes[0] == 1
    assert sizes[-1] == 200
    assert set(sizes) <= {1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200}
    assert all(a <= b for a, b in pairwise(sizes))


# ----------------------------------------------------------------------------------- ECT and TCM
def ect(path=FLOW, shrink=None, **options) -> Consistency:
    options = {"solver": "data", "boundary": "none", "loss": "norm", **options}
    return make(path, shrink=shrink or {}, **options)


VP_LOWEST = float(noise_ratio(VP, torch.tensor([1e-3], dtype=torch.float64)))


def drawn(method: Consistency, step: int = 0, max_steps: int = 8, bsz: int = 4096):
    """(t, r) as EDM's sigma, and the path times (t, s)."""
    shrink, path = method.config.shrink, method.setting.path
    ctx = Ctx64(step=step, max_steps=max_steps)
    t, s = shrink.pair(ctx, bsz, path, method.grid.end)
    return noise_ratio(path, t), noise_ratio(path, s), t, s


@pytest.mark.parametrize("path", PATHS)
def test_pairs_follow_ect_s_law_and_narrow_by_stages(path):
    method, shares = ect(PATHS[path], boundary="auto" if path == "ve" else "none"), []
    lowest = {"flow": 1 / 999, "vp": VP_LOWEST, "ve": 0.002 + 1e-9}[path]
    for stage in range(8):
        now, later, t, s = drawn(method, stage)
        assert bool((s < t)[now > lowest].all())
        wanted = (1 - (1 + 8 * (-now).sigmoid()) / 2 ** (stage + 1)).clamp(0, 0.999)
        wanted = torch.where(wanted > 0, wanted.clamp_min(lowest / now), wanted)[now > 0.2]
        share = (later / now)[now > 0.2]  # below it a table's entries are far apart
        if path == "ve":  # it ends at sigma_min, not at 0
            wanted = wanted.clamp_min(lowest / now[now > 0.2])
        shares.append(share)
        close = {"flow": 1e-6, "ve": 1e-6, "vp": 2e-2}[path]
        torch.testing.assert_close(share, wanted, rtol=0, atol=close)
    assert all(float(a.mean()) < float(b.mean()) for a, b in pairwise(shares))
    if path == "flow":  # stage 0: diffusion training for all t below about 1.95
        now, later, *_ = drawn(method)
        assert not later[now < 1.9].any()
        assert bool((later[now > 2.0] > 0).all())
        log = now.log()
        assert float(log.mean()) == pytest.approx(-1.1, abs=0.03)
        assert float(log.std()) == pytest.approx(2.0, abs=0.06)


def test_ect_s_first_targets_are_the_data_bit_for_bit():
    """r = 0: f(x0, 0) = x0, so that training starts as a regression on x0."""
    method, data = ect(VP, {"weight": "none"}), batch(std=0.5)
    student = GaussianTeacher(VP, 0.3)
    ctx = Ctx64(seed=1, max_steps=8)
    t, s = method.config.shrink.pair(ctx, 64, VP, 0.0)
    x_t = VP.noised(data.x0, ctx.randn(data.x0.shape), t)
    error = (student(x_t, t, data.cond).x0 - data.x0)[s == 0.0]
    assert 32 < len(error) < 64
    c = method.config.huber_c * 8
    own = ((error.flatten(1).square().sum(1) + c**2).sqrt() - c) / 8
    clean = s == 0.0
    nets = AnalyticNets({"student": student})
    total = method.loss(nets, data, Ctx64(seed=1, max_steps=8)).total
    rest = method.grid.blend(student(VP.add_noise(data.x0, torch.zeros_like(x_t), s), s, data.cond))
    assert torch.equal(rest[clean], data.x0[clean])
    assert float(own.sum() / 64) <= float(total)


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_ect_s_loss_is_zero_at_the_exact_map_of_a_point(path):
    method = ect(PATHS[path], loss="l2")
    nets = AnalyticNets({"student": ExactStudent(method, std=0.0)})
    for step in (0, 7):
        assert method.loss(nets, batch(std=0.0), Ctx64(step=step, max_steps=8)).total < 1e-14


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ("none", lambda now, later: torch.ones_like(now)),
        ("inverse_span", lambda now, later: 1 / (now - later)),
        ("c_out", lambda now, later: 1 / now**2 + 4),
    ],
)
def test_weights_of_ect_s_pairs(weight, expected):
    method = ect(FLOW, {"weight": weight})
    now, later, t, s = drawn(method, 3)
    found = method.config.shrink.weights(FLOW, t, s)
    torch.testing.assert_close(found, expected(now, later), rtol=1e-6, atol=0)


def test_gradient_of_the_norm_has_unit_size():
    """d |e| / d e of a constant error: its size does not shrink with the error."""
    sizes = []
    for value in (0.1, 0.2):
        method = ect(FLOW, {"weight": "none"}, huber_c=1e-9)
        theta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        student = ExactStudent(method, std=0.0, error=lambda t, theta=theta: theta * (t > 0))
        method.loss(
            AnalyticNets({"student": student}), batch(std=0.0), Ctx64(max_steps=8)
        ).total.backward()
        sizes.append(float(theta.grad))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)
    # All targets of stage 0 but few are data: |e| of 8 equal parts over 8 is theta / sqrt(8).
    assert 0.6 / 8**0.5 < sizes[0] <= 1 / 8**0.5 + 1e-9


TCM = {"truncate_at": 1.0, "q": 1000.0, "stages": 1}


@pytest.mark.parametrize("path", ["vp", "flow"])
def test_truncated_times_start_at_the_edge_with_a_quarter_on_it(path):
    method = ect(PATHS[path], TCM)
    now, later, t, s = drawn(method)
    edge = float(now.min())
    assert edge == pytest.approx(1.0, abs=5e-3)
    assert float((now == edge).double().mean()) == pytest.approx(0.25, abs=0.01)
    assert bool((later[now == edge] < edge).all())
    weights = method.config.shrink.weights(PATHS[path], t, s) * (now - later)
    assert float(weights[now == edge].sum() / weights.sum()) == pytest.approx(0.1 / 1.1, abs=0.01)
    above = now[now > edge].log() / 2.0 + 1.1 / 2.0  # standard normal, cut at its value there
    low = 1.1 / 2.0
    density = math.exp(-(low**2) / 2.0) / math.sqrt(2.0 * math.pi)
    tail = 0.5 * math.erfc(low / math.sqrt(2.0))
    assert float(above.mean()) == pytest.approx(density / tail, abs=0.05)


def test_below_the_edge_the_start_answers_and_above_it_the_student():
    """A reference that is off changes the targets below t' alone; equal networks are ECT."""
    method, data = ect(FLOW, TCM, loss="l2"), batch(256, std=0.5)
    assert set(method.roles()) == {"student", "reference"}
    assert method.roles()["reference"].ema_of == "student"
    method.after(AnalyticNets({}), 1)  # it is never updated
    student = ExactStudent(method, std=0.3)
    ctx = Ctx64(max_steps=8)

    def loss(reference):
        nets = AnalyticNets({"student": student, "reference": reference})
        return float(method.loss(nets, data, Ctx64(max_steps=8)).total)

    t, s = method.config.shrink.pair(ctx, 256, FLOW, 0.0)
    below = s < 0.5
    assert int(below.sum()) >= 64  # the quarter on the edge, at the least
    same, off = loss(student), loss(ExactStudent(method, 0.3, error=lambda t: 0.1 + 0 * t))
    weight = method.config.shrink.weights(FLOW, t, s)
    x_t = FLOW.noised(data.x0, ctx.randn(data.x0.shape), t)
    x_s = x_t + expand(s - t, x_t) * ((x_t - data.x0) / expand(t, x_t))
    error = student(x_t, t, data.cond).x0 - student(x_s, s, data.cond).x0
    moved = error - 0.1 * below.view(-1, 1, 1, 1)
    for e, found in ((error, same), (moved, off)):
        assert float((weight * e.square().flatten(1).mean(1)).mean()) == pytest.approx(found)


# ------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "path", "message"),
    [
        ({"boundary": "lcm"}, FLOW, "flow path needs none"),
        ({"boundary": "cd"}, VP, "cd for VE"),
        ({"num_grid": 30}, VP, "divisor of the 1000-step"),
        ({"guidance_range": (5.0, 4.0)}, VP, "low <= high"),
        ({"embed_guidance": True, "guidance_range": (4.0, 5.0)}, VP, "inside guidance_range"),
        ({"embed_guidance": True, "solver": "data"}, VP, "guided solver"),
        ({"num_steps": 60}, FLOW, "at most num_grid"),
        ({"growth": {"start": 60, "steps": 5}}, FLOW, "growth.start: expected at most"),
        ({"growth": {"steps": 5}, "shrink": {}}, FLOW, "shrink: expected no growth beside it"),
    ],
)
def test_bad_options_are_refused(options, path, message):
    with pytest.raises(ValueError, match=message):
        make(path, **options)


def test_contract():
    method = make(VP, embed_guidance=True, guidance_range=(4.0, 16.0), target="ema")
    assert METHODS["consistency"] is Consistency
    assert method.needs == {"x0", "cond"}
    assert method.roles()["student"].extra_inputs == ("w",)
    assert method.roles()["target"].extra_inputs == ("w",)
    assert method.roles()["teacher"].extra_inputs == ()
    assert [phase.trains for phase in method.phases(0)] == [("student",)]


@pytest.mark.parametrize("name", ["cd", "ct", "lcm", "lcm_lora", "ect", "tcm"])
def test_shipped_configs_are_valid(name):
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="model", **raw)
    method = Consistency(ConsistencyConfig(**run.method_config), Setting(VP))
    assert run.method == method.name
    assert ("target" in method.roles()) == (name not in ("lcm_lora", "ect", "tcm"))
    assert ("reference" in method.roles()) == (name == "tcm")
    if name == "lcm_lora":  # scale 1: alpha is always written out
        assert run.tuning.lora("student") == (64, 64.0)
    if method.config.embed_guidance:
        assert run.tuning.layout("student") == "full"


@pytest.mark.parametrize(("step", "stage"), [(0, 0), (2, 0), (3, 1), (5, 1), (6, 1)])
def test_stages_are_whole_and_the_last_one_stays(step, stage):
    """Six updates in two stages; a run that goes on behind its length stays in the last."""
    method = ect(FLOW, {"stages": 2})
    now, later, *_ = drawn(method, step, max_steps=6)
    wanted = (1 - (1 + 8 * (-now).sigmoid()) / 2 ** (stage + 1)).clamp(0, 0.999)
    high = now > 2.0  # where r is above 0 in both
    torch.testing.assert_close((later / now)[high], wanted[high], rtol=0, atol=1e-6)


def test_laws_on_all_times_end_before_pure_noise_and_clean_data():
    ends = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert drawn_times(FLOW, ends, 0.0, 1.0).tolist() == pytest.approx([1e-3, 0.5, 1 - 1e-3])
    ratios = noise_ratio(FLOW, torch.tensor([0.5, 0.9999, 1.0], dtype=torch.float64))
    assert ratios.tolist() == pytest.approx([1.0, 999.0, 999.0])
