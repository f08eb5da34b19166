"""Rectified flow against straight couplings with closed forms."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from stepdistill.config.run import RunConfig
from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, VEPath, VPPath, expand, flow_time
from stepdistill.core.solvers import sample_x0
from stepdistill.core.types import Batch, Cond
from stepdistill.methods import METHODS
from stepdistill.methods.grid import path_time
from stepdistill.methods.reflow import Reflow
from stepdistill.methods.reflow_config import ReflowConfig
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
VP, FLOW, VE = VPPath.from_betas(BETAS), FlowPath(), VEPath()
PATHS = {"vp": VP, "flow": FLOW, "ve": VE}
SHAPE = (2, 2, 2)
MU, Q = 0.7, 0.5  # the coupling x0 = MU + Q noise, where the teacher's ODE takes noise


class Ctx64(Ctx):
    """Float64 draws, so that residuals of 1e-12 can be told from rounding."""

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        return super().randn(shape).double()


class Straight(AnalyticDenoiser):
    """The rectified velocity of the coupling (z, MU + Q z), x0 = MU + Q z, plus an error of x0.

    The line ends at the sampler's first state, c z at t = 1: x = rest x0 + (sigma / sigma_1) c z
    with rest = alpha - sigma alpha_1 / sigma_1, which is alpha x0 + sigma z on a flow path.
    """

    def __init__(self, path: NoisePath, kind="x0", error=None):
        super().__init__(path, kind)
        self.error = error
        self.seen: list[tuple[Tensor, Tensor]] = []

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen.append((x_t, t))
        alpha, sigma = (expand(c, x_t) for c in self.path.coeffs(t))
        alpha_1, sigma_1 = (expand(c, x_t) for c in self.path.coeffs(torch.ones_like(t)))
        rest = alpha - sigma * alpha_1 / sigma_1
        share = sigma / sigma_1 * self.path.prior(torch.ones_like(x_t))
        x0 = MU + Q * (x_t - rest * MU) / (rest * Q + share)
        return x0 if self.error is None else x0 + self.error(expand(t, x_t))


def pairs(bsz: int = 256, permuted: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(bsz, *SHAPE, generator=generator, dtype=torch.float64)
    x0 = MU + Q * noise
    cond = Cond({"mean": torch.full((bsz, *SHAPE), MU, dtype=torch.float64)})
    return Batch(cond, cond, SHAPE, x0=x0.roll(1, 0) if permuted else x0, noise=noise)


def make(path: NoisePath = FLOW, **options) -> Reflow:
    return Reflow(ReflowConfig(**options), Setting(path, "eps" if path is VP else "flow"))


def loss_of(method: Reflow, student: AnalyticDenoiser, data: Batch, seed: int = 1) -> Tensor:
    (phase,) = method.phases(0)
    return phase.loss(AnalyticNets({"student": student}), data, Ctx64(seed=seed)).total


# -------------------------------------------------------------------------------- stage reflow
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("path", PATHS)
def test_reflow_loss_is_zero_at_the_straight_field(path, kind):
    # VE's sigma is 4e-19 at tau's floor: eps there is rounding of x0 over sigma
    options = {"t_range": (0.1, 1.0)} if path == "ve" else {}
    loss = loss_of(make(PATHS[path], **options), Straight(PATHS[path], kind), pairs())
    assert loss < 1e-16


def test_reflow_loss_of_the_teacher_before_reflow_is_its_curvature():
    """The independent-coupling field of the same marginals is not straight on these pairs."""
    teacher, data = GaussianTeacher(FLOW, Q, "flow"), pairs(4096)
    method, tau = make(FLOW), Ctx64(seed=1).rand(4096)
    t = 1e-3 + (1 - 1e-3) * tau
    z = data.noise
    slope = expand((t - (1 - t) * Q**2) / ((1 - t) ** 2 * Q**2 + t**2), z)
    line = expand((1 - t) * Q + t, z)
    expected = ((-MU + slope * line * z - (z - data.x0)) ** 2).mean()
    torch.testing.assert_close(loss_of(method, teacher, data), expected)
    assert expected > 0.01


def test_permuted_pairs_leave_an_irreducible_loss():
    """Mispaired, the same field is off by Q (z' - z) seen from x_t: strictly positive."""
    for path in (VP, FLOW):
        method, student = make(path, t_range=(0.1, 0.9)), Straight(path)
        paired, mixed = (loss_of(method, student, pairs(1024, permuted=p)) for p in (False, True))
        assert paired < 1e-20
        assert mixed > 0.1


def test_best_field_on_permuted_pairs_pays_the_conditional_variance():
    """Independent ends: the optimum is the posterior mean, and Var(flow | x_t) = Q^2 / V_t."""
    method, bsz = make(FLOW, t_range=(0.1, 0.9)), 4096
    t = method.draw_times(Ctx64(seed=1), bsz)
    expected = (Q**2 / ((1 - t) ** 2 * Q**2 + t**2)).mean()
    loss = loss_of(method, GaussianTeacher(FLOW, Q), pairs(bsz, permuted=True))
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)


@pytest.mark.parametrize("path", ["flow", "vp"])
def test_gradient_off_the_solution_has_its_closed_form(path):
    """x0 off by theta tau: flow is off by -theta, so loss = theta^2 and d/dtheta = 2 theta."""
    path = PATHS[path]
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def error(t: Tensor) -> Tensor:
        return theta * expand(flow_time(path, t.flatten()), t)

    loss = loss_of(make(path), Straight(path, error=error), pairs())
    loss.backward()
    torch.testing.assert_close(loss.item(), 0.09, rtol=1e-9, atol=0)
    torch.testing.assert_close(theta.grad.item(), 0.6, rtol=1e-9, atol=0)


def test_gradient_is_zero_at_the_solution():
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss_of(make(), Straight(FLOW, error=lambda t: theta * t), pairs()).backward()
    assert theta.grad.abs() < 1e-10


def test_wrapped_on_vp_equals_the_rectified_flow_loss():
    """Reading the VP student in flow coordinates, x / (alpha + sigma) at tau, changes nothing."""
    method, data = make(VP, setup="wrapped"), pairs()
    teacher = GaussianTeacher(VP, Q, "eps")
    loss = loss_of(method, teacher, data)
    tau = flow_time(VP, path_time(VP, method.draw_times(Ctx64(seed=1), 256)))
    alpha, sigma = (float(c) for c in VP.coeffs(torch.ones(1)))
    end = (data.noise - alpha * data.x0) / sigma  # the line through pure noise at t = 1
    x_rf = FLOW.add_noise(data.x0, end, tau)
    flow = GaussianTeacher(FLOW, Q, "flow")(x_rf, tau, data.cond).flow  # same posterior mean
    expected = ((flow - (end - data.x0)) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert expected > 0.01


def test_raw_student_stands_on_the_flow_path_at_1000_t():
    method = make(VP, setup="raw")
    assert method.roles()["student"].as_flow
    assert not make(VP).roles()["student"].as_flow
    student = Straight(FLOW, "flow")
    assert loss_of(method, student, pairs()) < 1e-20
    ((x_t, t),) = student.seen
    data = pairs()
    torch.testing.assert_close(x_t, FLOW.add_noise(data.x0, data.noise, t))
    assert torch.equal(t, method.draw_times(Ctx64(seed=1), 256))
    torch.testing.assert_close(method.path.model_time(t), 1000 * t)


def test_raw_and_wrapped_are_one_on_a_flow_teacher():
    teacher, data = GaussianTeacher(FLOW, Q, "flow"), pairs()
    wrapped, raw = (loss_of(make(FLOW, setup=s), teacher, data) for s in ("wrapped", "raw"))
    assert torch.equal(wrapped, raw)


def pure_noise_rows(method, student, data: Batch, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(inputs at t = 1, the sampler's first inputs from the same noise) of one loss."""
    (phase,) = method.phases(0)
    nets = AnalyticNets({"student": student, "teacher": student}, scorers={"lpips": lpips_of_zero})
    phase.loss(nets, data, Ctx64(seed=seed, step=0))
    x_t, t = student.seen[0]
    student.seen.clear()
    sample_x0(student, method.sampler(1), data.noise, data.cond)
    (first, at), *_ = student.seen
    assert at.unique().tolist() == [1.0]
    rows = t == 1.0
    return x_t[rows], first[rows]


def lpips_of_zero(images: Tensor, by: Tensor) -> Tensor:
    return (images - by).square().flatten(1).sum(1)


@pytest.mark.parametrize("stage", ["reflow", "distill"])
@pytest.mark.parametrize("path", PATHS)
def test_training_at_the_first_time_sees_what_sampling_starts_from(path, stage):
    """Pure noise, with no trace of x0: the table's last entry and sigma_max would leave one."""
    options = {"t_range": (0.9999, 1.0)} if stage == "reflow" and path == "ve" else {}
    method, student = make(PATHS[path], stage=stage, **options), Straight(PATHS[path])
    inputs, first = pure_noise_rows(method, student, pairs(1024))
    assert len(inputs) > 30 or (path, stage) == ("flow", "reflow")  # t = 1 has no mass of its own
    assert torch.equal(inputs, first)


@pytest.mark.parametrize("path", PATHS)
def test_the_sampler_visits_the_states_that_were_trained(path):
    """With the exact x0 every input of four steps lies on the line of its pair, bit by bit or
    nearly: what the loss draws at that time from the same pair."""
    data, student, chosen = pairs(64), Straight(PATHS[path]), PATHS[path]
    spec = make(chosen).sampler(4)
    x0 = sample_x0(student, spec, data.noise, data.cond)
    torch.testing.assert_close(x0, data.x0, rtol=0, atol=1e-9)
    for x_t, t in student.seen:
        line, _ = chosen.line_to_prior(data.x0, data.noise, t)
        torch.testing.assert_close(x_t, line, rtol=0, atol=1e-9)


# --------------------------------------------------------------------------- times and samplers
@pytest.mark.parametrize(
    ("index", "tau"), [(0, 0.0283), (249, 0.4094), (499, 0.6173), (749, 0.8032), (999, 0.9360)]
)
def test_flow_time_of_the_sd_table(index, tau):
    t = VP.time_of(torch.tensor([index]))
    torch.testing.assert_close(flow_time(VP, t).item(), tau, rtol=0, atol=2e-4)
    assert VP.model_time(path_time(VP, flow_time(VP, t))).tolist() == [index]


def test_path_time_inverts_flow_time_and_clamps():
    tau = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    assert torch.equal(path_time(FLOW, tau), tau)
    torch.testing.assert_close(flow_time(VE, path_time(VE, tau)), tau.clamp_max(80 / 81))
    low = path_time(VE, torch.tensor([1e-5], dtype=torch.float64))
    torch.testing.assert_close(VE.coeffs(low)[1].item(), VE.sigma_min, rtol=1e-9, atol=0)
    ends = path_time(VP, torch.tensor([1e-3, 1.0], dtype=torch.float64))
    assert VP.model_time(ends).tolist() == [0, 999]
    index = VP.model_time(path_time(VP, tau))
    assert torch.equal(index, index.round())  # a VP teacher knows its table alone
    near = flow_time(VP, path_time(VP, tau.clamp(0.03, 0.93)))
    assert (near - tau.clamp(0.03, 0.93)).abs().max() < 5e-3  # half a table step


def test_straight_field_has_straightness_zero_and_one_exact_step():
    """mean |(x_i - x_{i+1}) / dt - (noise - x0)|^2: 0 for the straight field alone."""
    data = pairs()

    def straightness(student: AnalyticDenoiser) -> float:
        x, points = data.noise, [data.noise]
        times = torch.linspace(1, 0, 9, dtype=torch.float64)
        for now, later in pairwise(times):
            t, s = now.expand(256), later.expand(256)
            x = student(x, t, data.cond).step(s)
            points.append(x)
        slopes = [(a - b) * 8 for a, b in pairwise(points)]
        chord = points[0] - points[-1]
        return float(torch.stack([(slope - chord) ** 2 for slope in slopes]).mean())

    assert straightness(Straight(FLOW)) < 1e-20
    assert straightness(GaussianTeacher(FLOW, Q)) > 1e-2
    x0 = sample_x0(Straight(FLOW), make().sampler(1), data.noise, data.cond)
    torch.testing.assert_close(x0, data.x0)
    mean = sample_x0(GaussianTeacher(FLOW, Q), make().sampler(1), data.noise, data.cond)
    torch.testing.assert_close(mean, torch.full_like(mean, MU))  # one step of the teacher: the mean


@pytest.mark.parametrize("setup", ["wrapped", "raw"])
def test_sampler_grids(setup):
    spec = make(VP, setup=setup, num_steps=4).sampler()
    assert (spec.kind, spec.trained_times) == ("ode", None)
    times = torch.tensor(spec.times, dtype=torch.float64)
    expected = [999, 749, 499, 249] if setup == "wrapped" else [1000, 750, 500, 250]
    assert make(VP, setup=setup).path.model_time(times).tolist() == expected


def test_wrapped_sampler_stays_on_the_table():
    times = torch.tensor(make(VP).sampler(3).times, dtype=torch.float64)
    assert VP.model_time(times).tolist() == [999, 666, 332]


# ------------------------------------------------------------------------------- stage distill
@pytest.mark.parametrize("num_steps", [1, 4])
@pytest.mark.parametrize("path", PATHS)
def test_distill_loss_is_zero_at_the_exact_map(path, num_steps):
    method = make(PATHS[path], stage="distill", num_steps=num_steps)
    student = Straight(PATHS[path])
    assert loss_of(method, student, pairs()) < 1e-20


def test_one_step_distillation_starts_from_the_pure_prior():
    for path in PATHS.values():
        student, data = Straight(path), pairs()
        loss_of(make(path, stage="distill"), student, data)
        ((x_t, t),) = student.seen
        assert torch.equal(x_t, path.prior(data.noise))
        assert t.unique().tolist() == [1.0]


def test_distill_times_are_the_sampler_grid_drawn_evenly():
    method = make(VP, stage="distill", num_steps=4)
    student = Straight(VP)
    loss_of(method, student, pairs(4096))
    values, counts = student.seen[0][1].unique(return_counts=True)
    spec = method.sampler()
    assert spec.times == spec.trained_times == tuple(reversed(values.tolist()))
    assert (counts / 4096 - 0.25).abs().max() < 0.03
    assert method.sampler(2).times == (1.0, 0.5)
    with pytest.raises(ValueError, match="trained grid"):
        method.sampler(3)


def test_one_step_students_may_be_conditioned_on_an_earlier_time():
    """DMD2's one-step SDXL warm start: pure noise in, index 399, weight 1."""
    method, data = make(VP, stage="distill", student_times=(0.4,)), pairs(8)
    off = data.x0 + 0.3

    class Constant(AnalyticDenoiser):
        def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            self.seen = x_t, t
            return off

    student = Constant(VP)
    assert loss_of(method, student, data).item() == pytest.approx(0.09, rel=1e-9)
    x_t, t = student.seen
    assert torch.equal(x_t, VP.prior(data.noise))
    assert VP.model_time(t).unique().tolist() == [399.0]
    assert method.sampler().times == method.sampler(1).times == (0.4,)


def test_distill_gradient_has_its_closed_form():
    """x0 off by theta: loss = theta^2 E (1 / tau)^2 on the k grid times, so equal flow errors."""
    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    method = make(FLOW, stage="distill", num_steps=2)
    loss = loss_of(method, Straight(FLOW, error=lambda t: theta + 0 * t), pairs(64))
    loss.backward()
    half = float((Ctx64(seed=1).rand(64) >= 0.5).double().mean())  # index 1 is t = 1/2
    expected = (1 - half) + 4 * half
    torch.testing.assert_close(loss.item(), 0.04 * expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(theta.grad.item(), 0.4 * expected, rtol=1e-9, atol=0)


def test_distill_lpips_judges_decoded_images_at_one_step():
    def judge(images: Tensor, by: Tensor) -> Tensor:
        assert not by.requires_grad
        return 3 * (images - by).square().mean(dim=(1, 2, 3))

    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    method = make(FLOW, stage="distill", loss="lpips")
    student = Straight(FLOW, error=lambda t: theta + 0 * t)
    (phase,) = method.phases(0)
    nets = AnalyticNets({"student": student}, scorers={"lpips": judge})
    loss = phase.loss(nets, pairs(64), Ctx64(seed=1)).total
    loss.backward()
    torch.testing.assert_close(loss.item(), 3 * 0.04)
    torch.testing.assert_close(theta.grad.item(), 3 * 0.4)
    assert method.scorers()["lpips"].kind == "lpips"
    assert make(FLOW, stage="distill").scorers() == {}


def test_distill_huber():
    method = make(FLOW, stage="distill", loss="huber", huber_c=1e-3)
    loss = loss_of(method, Straight(FLOW, error=lambda t: 0.2 + 0 * t), pairs(64))
    torch.testing.assert_close(loss.item(), (0.04 + 1e-6) ** 0.5 - 1e-3, rtol=1e-9, atol=0)


# -------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"t_range": (0.0, 1.0)}, "0 < low < high <= 1"),
        ({"t_range": (0.5, 0.2)}, "0 < low < high <= 1"),
        ({"loss": "huber"}, "'l2' in stage reflow"),
        ({"stage": "distill", "loss": "lpips", "num_steps": 2}, "'lpips' with one trained time"),
        ({"stage": "pairs"}, "'reflow' or 'distill'"),
        ({"student_times": (0.4,)}, "descending times in .* and stage distill"),
        ({"student_times": (0.4, 0.6), "stage": "distill"}, "descending times in"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_contract():
    method = make()
    assert METHODS["reflow"] is Reflow
    assert method.needs == {"x0", "noise", "cond"}
    assert [phase.trains for phase in method.phases(0)] == [("student",)]


@pytest.mark.parametrize(
    ("name", "stage"),
    [("reflow", "reflow"), ("reflow_distill", "distill"), ("dmd2_warm_start", "distill")],
)
def test_shipped_configs_are_valid(name, stage):
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="model", **raw)
    method = Reflow(ReflowConfig(**run.method_config), Setting(VP))
    assert (run.method, method.config.stage) == (method.name, stage)
    if name == "dmd2_warm_start":  # piq's LPIPS(replace_pooling=True) on taesdxl's images, 4 each
        assert (method.config.lpips.pooling, method.config.lpips.resize) == ("avg", None)
        assert (run.decoder, run.train_batch_size) == ("madebyollin/taesdxl", 4)
