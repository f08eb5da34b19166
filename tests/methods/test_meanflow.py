"""MeanFlow, sCM and rCM against exact flow maps of Gaussian teachers."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from support.jumps import FLOW, SETTINGS, SHAPE, VP, Ctx64, batch, reach
from torch import Tensor

from stepdistill.config.run import RunConfig
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, VEPath, expand, flow_time
from stepdistill.core.solvers import sample_x0
from stepdistill.core.types import Cond
from stepdistill.methods import METHODS
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.grid import path_time
from stepdistill.methods.meanflow import SCM, MeanFlow
from stepdistill.methods.meanflow_config import MeanFlowConfig
from stepdistill.methods.residual import residual, scm_weight
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
PATHS = {**SETTINGS, "ve": (VEPath(), 1.0)}
SMOOTH = [name for name in PATHS if name != "vp"]


def make(setting: str = "flow", **options) -> MeanFlow:
    path, shift = PATHS[setting]
    return MeanFlow(MeanFlowConfig(**{"guidance": 1.0, **options}), Setting(path, "flow", shift))


class Student(AnalyticDenoiser):
    """The exact average velocity to r, times and plus an error: u = scale U + offset.

    end_of: t -> r, for students that are not told r.
    """

    def __init__(self, path, std=0.5, end_of=torch.zeros_like, scale=1.0, offset=0.0):
        super().__init__(path, "flow")
        self.std, self.end_of, self.scale, self.offset = std, end_of, scale, offset

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        end = self.end_of(t) if self.end is None else self.end
        teacher = GaussianTeacher(self.path, self.std)
        x_r = teacher.flow_map(x_t, t, end, cond)
        jump = reach(self.path, x_t, x_r, t, end)
        u = self.path.convert(jump, x_t, t, "x0", "flow")
        same = (t - end).abs() < 1e-12
        v = self.path.convert(teacher.posterior_mean(x_t, t, cond), x_t, t, "x0", "flow")
        u = torch.where(same.view(-1, *([1] * (u.ndim - 1))), v, u)
        return self.path.to_x0(self.scale * u + self.offset, x_t, t, "flow")


def residual_of(method: MeanFlow, student, seed: int = 0, bsz: int = 1024, step: int = 0) -> Tensor:
    """D (B, C, *S) of a draw of that seed, the same for all estimators."""
    path, data, ctx = method.setting.path, batch(bsz, std=0.5), Ctx64(seed=seed)
    t, r = method.draw_pair(ctx, bsz)
    x_t = path.noised(data.x0, ctx.randn(tuple(data.x0.shape)), t)
    real = GaussianTeacher(path, 0.5)(x_t, t, data.cond)
    told = r if method.config.r == "general" else None

    def average(x, t):
        return student(x, t, data.cond, s=told).flow

    return residual(method.config, step, average, real, average(x_t, t), r)


def rms(x: Tensor) -> float:
    return float((x**2).mean().sqrt())


def phase_end(method: MeanFlow):
    return lambda t: method.edges[torch.searchsorted(method.edges, t - 1e-9) - 1]


# ------------------------------------------------------------------ the residual at the solution
@pytest.mark.parametrize("setting", SMOOTH)
def test_residual_of_the_exact_average_is_zero(setting):
    """D = v - U - (tau - rho) dU/dtau = 0 for r = 0, for phases, and for any r."""
    path = PATHS[setting][0]
    zero = make(setting, **SCM, estimator="jvp")
    assert rms(residual_of(zero, Student(path))) < 1e-10
    phases = make(setting, num_steps=4, estimator="jvp")
    assert rms(residual_of(phases, Student(path, end_of=phase_end(phases)))) < 1e-9
    with pytest.warns(UserWarning, match="export will be refused"):
        general = make(setting, r="general", estimator="jvp")
    assert rms(residual_of(general, Student(path))) < 1e-7  # short jumps divide by t - r


@pytest.mark.parametrize("estimator", ["backward", "alphaflow"])
@pytest.mark.parametrize("setting", PATHS)
def test_difference_at_the_exact_average_is_of_first_order(setting, estimator):
    """The error halves with the span; a table rounds the shortest spans."""
    student = Student(PATHS[setting][0])
    errors = [
        rms(residual_of(make(setting, **SCM, estimator=estimator, h=h, alpha=h), student))
        for h in (0.04, 0.02)
    ]
    assert errors[1] < 0.01
    assert abs(errors[0] / errors[1] - 2.0) < (0.15 if setting == "vp" else 0.05), errors


@pytest.mark.parametrize("estimator", ["backward", "alphaflow"])
@pytest.mark.parametrize("setting", PATHS)
def test_differences_stay_inside_their_phase(setting, estimator):
    """At an edge the student answers for the phase below: no difference may reach over it."""
    sizes = []
    for span in (0.04, 0.02):
        method = make(setting, num_steps=4, estimator=estimator, h=span, alpha=span, time_std=1.6)
        student = Student(PATHS[setting][0], end_of=phase_end(method))
        sizes.append(rms(residual_of(method, student)))
    assert sizes[1] < 0.012
    assert sizes[0] < 0.03


@pytest.mark.parametrize("setting", SMOOTH)
def test_three_estimators_agree_off_the_solution(setting):
    """To the exact derivative at a wrong student: error ratio 2 per halving of h, and of alpha."""
    student = Student(PATHS[setting][0], std=0.3, scale=0.8, offset=0.1)
    exact = residual_of(make(setting, **SCM, estimator="jvp"), student)
    for estimator in ("backward", "alphaflow"):
        errors = [
            rms(
                residual_of(make(setting, **SCM, estimator=estimator, h=h, alpha=h), student)
                - exact
            )
            for h in (0.02, 0.01, 0.005)
        ]
        assert errors[0] < 0.1 * rms(exact)
        assert [a / b for a, b in pairwise(errors)] == pytest.approx([2.0, 2.0], rel=0.04)


def test_alpha_one_and_the_start_of_a_warm_up_match_velocities():
    """u_target = v: trajectory flow matching; so is every estimator's first update."""
    student = Student(FLOW, std=0.3)
    plain = residual_of(make(**SCM, estimator="alphaflow", alpha=1.0), student)
    for estimator in ("backward", "jvp"):
        method = make(**SCM, estimator=estimator, warmup_steps=10)
        torch.testing.assert_close(residual_of(method, student), plain, rtol=0, atol=1e-12)
        half, full = (residual_of(method, student, step=step) for step in (5, 10))
        torch.testing.assert_close(half, 0.5 * (plain + full), rtol=1e-9, atol=1e-12)


def test_alphaflow_s_ratio_falls_from_one_along_a_sigmoid():
    config = MeanFlowConfig(estimator="alphaflow", alpha=0.05, warmup_steps=100)
    assert config.ratio(0) == pytest.approx(1.0, abs=1e-5)
    assert config.ratio(50) == pytest.approx(0.5)
    assert config.ratio(100) == config.ratio(500) == 0.05
    assert MeanFlowConfig(alpha=0.2).ratio(0) == 0.2


def test_teacher_as_student_has_velocity_for_residual_where_r_is_t():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = make(r="general", same_share=0.999)
    assert rms(residual_of(method, GaussianTeacher(FLOW, 0.5), bsz=256)) < 0.05


# ------------------------------------------------------------------------------ it is sCM's tangent
def trig(tau: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos t, sin t of TrigFlow at rectified-flow time tau, shaped as `like`."""
    t = torch.atan2(tau, 1.0 - tau)
    return expand(t.cos(), like), expand(t.sin(), like)


def test_normalised_tangent_of_scm_is_the_normalised_residual():
    """g = -cos^2 (F - F_T) - (cos sin x + dF) of arXiv:2410.11081, Alg. 1, against D at r = 0."""
    data, ctx = batch(256, std=0.5), Ctx64(seed=3)
    tau = ctx.rand(256) * 0.9 + 0.05
    x = FLOW.add_noise(data.x0, ctx.randn((256, *SHAPE)), tau)
    student, teacher = Student(FLOW, std=0.3, scale=0.7, offset=0.2), GaussianTeacher(FLOW, 0.5)

    def wrapped(net, x_trig: Tensor, t: Tensor) -> Tensor:
        """F of a flow network: x0 = cos t x - sin t F."""
        tau = t.sin() / (t.sin() + t.cos())
        c, s = expand(t.cos(), x_trig), expand(t.sin(), x_trig)
        x0 = net(x_trig / (s + c), tau, data.cond).x0
        return (c * x_trig - x0) / s

    cos, sin = trig(tau, x)
    t, x_trig = torch.atan2(tau, 1.0 - tau), x * (cos + sin)
    f_t, pace = wrapped(teacher, x_trig, t), cos[:, 0, 0, 0] * sin[:, 0, 0, 0]
    own, moved = torch.func.jvp(
        lambda x, t: wrapped(student, x, t), (x_trig, t), (cos * sin * f_t, pace)
    )
    tangent = -(cos**2) * (own - f_t) - (cos * sin * x_trig + moved)
    real = teacher(x, tau, data.cond)

    def average(x, t):
        return student(x, t, data.cond).flow

    config = MeanFlowConfig(**SCM, estimator="jvp")
    d = residual(config, 0, average, real, average(x, tau), torch.zeros_like(tau))
    torch.testing.assert_close(tangent, cos / (cos + sin) ** 2 * d, rtol=1e-8, atol=1e-10)
    cosine = (tangent * d).flatten(1).sum(1) / (
        tangent.flatten(1).norm(dim=1) * d.flatten(1).norm(dim=1)
    )
    assert float((cosine - 1).abs().max()) < 1e-12
    # Its loss |F - sg(F + g)|^2 / tan t moves u by scm_weight times the tangent.
    expected = 1.0 / t.tan() / (t.sin() + t.cos())
    torch.testing.assert_close(scm_weight(tau), expected, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize(("power", "c"), [(0.0, 0.1), (1.0, 0.1), (2.0, 0.5)])
def test_gradient_at_a_shifted_average_has_its_closed_form(power, c):
    """u = U + theta has D = -theta, so that d loss / d theta = theta / (|theta| + c)^p."""
    for value in (0.0, 0.3, -0.2):
        theta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        method = make(**SCM, estimator="jvp", norm_power=power, norm_c=c)
        nets = AnalyticNets(
            {"teacher": GaussianTeacher(FLOW, 0.5), "student": Student(FLOW, offset=theta)}
        )
        losses = method.student_loss(nets, batch(64, std=0.5), Ctx64())
        losses.total.backward()
        assert float(theta.grad) == pytest.approx(value / (abs(value) + c) ** power, abs=1e-9)
        assert float(losses.logs["residual"]) == pytest.approx(value**2, abs=1e-12)


def test_guided_teacher_s_mean_is_what_r_zero_ends_at():
    """null mean 0, guidance 2: the student of the doubled mean has no residual."""
    method, data = make(**SCM, estimator="jvp", guidance=2.0), batch(64, mean=0.7, null=0.0)

    class Doubled(Student):
        def posterior_mean(self, x_t, t, cond):
            return super().posterior_mean(x_t, t, Cond({"mean": 2 * cond["mean"]}))

    nets = AnalyticNets({"teacher": GaussianTeacher(FLOW, 0.5), "student": Doubled(FLOW)})
    assert float(method.student_loss(nets, data, Ctx64()).logs["residual"]) < 1e-18
    nets = AnalyticNets({"teacher": GaussianTeacher(FLOW, 0.5), "student": Student(FLOW)})
    assert float(method.student_loss(nets, data, Ctx64()).logs["residual"]) > 0.1


def test_scm_weight_is_one_over_the_tangent_of_the_time():
    with_weight, plain = (
        make(**SCM, estimator="jvp", norm_power=0.0, time_weight=w) for w in ("scm", "none")
    )
    grads = []
    for method in (with_weight, plain):
        theta = torch.full((64, *SHAPE), 0.1, dtype=torch.float64, requires_grad=True)
        nets = AnalyticNets(
            {"teacher": GaussianTeacher(FLOW, 0.5), "student": Student(FLOW, offset=theta)}
        )
        method.student_loss(nets, batch(64, std=0.5), Ctx64()).total.backward()
        grads.append(theta.grad)
    t, _ = plain.draw_pair(Ctx64(), 64)
    expected = expand(scm_weight(t), grads[1])
    torch.testing.assert_close(grads[0] / grads[1], expected.expand_as(grads[1]), rtol=1e-7, atol=0)


def test_distribution_matching_is_dmd2_s_beside_it_behind_the_warm_up():
    method = make(**SCM, matching=0.5, warmup_steps=10)
    dmd2 = DMD2(DMD2Config(guidance=1.0), method.setting)
    nets = AnalyticNets(
        {
            "teacher": GaussianTeacher(FLOW, 0.5),
            "student": Student(FLOW, std=0.3),
            "fake": GaussianTeacher(FLOW, 0.4),
        }
    )
    data = batch(64, std=0.5)
    early = method.student_loss(nets, data, Ctx64(step=9))
    assert set(early.logs) == {"loss", "residual"}
    late = method.student_loss(nets, data, Ctx64(step=10))
    assert set(late.logs) == {"loss", "residual", "dm"}

    # dmd2's own draws, shifted by those of the residual before it.
    ctx = Ctx64(step=10)
    alone = method.residual_loss(nets, data, ctx)
    matched = dmd2.student_loss(nets, data, ctx)
    torch.testing.assert_close(late.total, alone.total + 0.5 * matched.total, rtol=1e-12, atol=0)
    assert [p.trains for p in method.phases(0)] == [("student",), ("fake",)]
    assert [p.reads_x0 for p in method.phases(0)] == [True, False]
    assert set(method.roles()) == {"teacher", "student", "fake"}
    assert method.fake_fit is not None
    assert make().fake_fit is None


# ------------------------------------------------------------------------------------- times and r
def test_times_are_logit_normal():
    method = make(**SCM, time_mean=0.5, time_std=0.7)
    t, r = method.draw_pair(Ctx64(), 20000)
    assert not r.any()
    logit = (t / (1 - t)).log()
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(logit.std()) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("setting", PATHS)
def test_phases_end_at_the_edge_below(setting):
    method = make(setting, num_steps=4, time_std=2.0)
    t, r = method.draw_pair(Ctx64(), 4096)
    edges = sorted((0.0, *method.sampler().times))
    assert sorted({round(x, 9) for x in r.tolist()}) == pytest.approx(edges[:-1])
    assert bool((r < t).all())
    above = torch.tensor(edges[1:], dtype=torch.float64)[torch.searchsorted(method.edges, r)]
    assert bool((t <= above + 1e-9).all())
    assert method.edges[torch.searchsorted(method.edges, above[:1] - 1e-9) - 1] == r[0]


def test_general_r_is_the_lower_of_two_draws_or_t_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = make(r="general", same_share=0.25)
    t, r = method.draw_pair(Ctx64(), 8192)
    assert bool((r <= t).all())
    assert float((r == t).double().mean()) == pytest.approx(0.25, abs=0.02)
    assert float(t.median()) > float(r[r < t].median())


def test_table_spans_reach_another_entry():
    """At a span below one entry of the table the difference still has one."""
    method = make("vp", **SCM, estimator="alphaflow", alpha=0.005)
    t = path_time(VP, torch.tensor([0.1, 0.5], dtype=torch.float64))
    student = Student(VP, std=0.3)
    x = batch(2).x0
    real = GaussianTeacher(VP, 0.5)(x, t, batch(2).cond)
    seen = []

    def average(x, t):
        seen.append(t)
        return student(x, t, batch(2).cond).flow

    u = average(x, t)
    d = residual(method.config, 0, average, real, u, torch.zeros_like(t))
    assert (VP.model_time(seen[0]) - VP.model_time(seen[1])).round().tolist() == [1, 3]
    assert rms(d - (real.flow - u)) > 0.01


# -------------------------------------------------------------------------------------- the sampler
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_exact_averages_sample_the_exact_flow(setting, num_steps):
    path = PATHS[setting][0]
    noise, data = Ctx64(seed=3).randn((64, *SHAPE)), batch(std=0.5)
    one = torch.ones(64).double()
    teacher = GaussianTeacher(path, 0.5)
    expected = teacher.flow_map(noise, one, 0 * one, data.cond)
    phases = make(setting, num_steps=num_steps)
    found = sample_x0(Student(path, end_of=phase_end(phases)), phases.sampler(), noise, data.cond)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        general = make(setting, r="general")
    found = sample_x0(Student(path), general.sampler(num_steps), noise, data.cond)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_samplers_serve_the_steps_that_were_trained():
    zero, phases = make(**SCM, student_times=(1.0, 0.783)), make(num_steps=4)
    assert zero.sampler().times == (1.0, 0.783)
    assert zero.sampler(4).times == (1.0, 0.75, 0.5, 0.25)
    assert (zero.sampler().kind, zero.sampler().trained_times) == ("renoise", None)
    assert (phases.sampler().kind, phases.sampler().tells_end) == ("ode", False)
    with pytest.raises(ValueError, match="expected times from the trained grid"):
        phases.sampler(3)


def test_contract():
    method = make()
    assert METHODS["meanflow"] is MeanFlow
    assert method.needs == {"x0", "cond"}
    assert set(method.roles()) == {"teacher", "student"}
    assert [phase.trains for phase in method.phases(0)] == [("student",)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert make(r="general").roles()["student"].extra_inputs == ("s",)


# ------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": "zero"}, "expected renoise with r zero, got ode"),
        ({"sampler": "renoise"}, "expected ode with r phases, got renoise"),
        ({"r": "general", "matching": 1.0}, "expected 0 with r general"),
        ({"h": 0.004}, "h"),
        ({"norm_power": 2.1}, "norm_power"),
        ({"student_times": (1.0, 0.5), "rollout": "pure_noise", "matching": 1.0}, "rollout"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_table_has_no_derivative_between_its_entries():
    with pytest.raises(ValueError, match="expected backward or alphaflow for a teacher with a tab"):
        make("vp", estimator="jvp")


def test_options_of_an_absent_matching_have_no_effect_and_say_so():
    with pytest.warns(UserWarning, match="critic_steps has no effect"):
        make(critic_steps=3)


@pytest.mark.parametrize("name", ["meanflow", "scm", "rcm"])
def test_shipped_configs_are_valid(name):
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="model", **raw)
    assert run.method == "meanflow"
    for setting in (Setting(FlowPath(), "flow", 3.0), Setting(VP, "v")):
        method = MeanFlow(MeanFlowConfig(**run.method_config), setting)
        assert method.sampler().kind == ("ode" if name == "meanflow" else "renoise")
        assert ("fake" in method.roles()) == (name == "rcm")


def test_time_and_weight_are_of_every_path_s_own_noise_ratio():
    """The same noise-to-signal ratio has the same law on all paths."""
    for path in (VP, VEPath()):
        t = path_time(path, torch.tensor([0.2, 0.6], dtype=torch.float64))
        assert flow_time(path, t).tolist() == pytest.approx([0.2, 0.6], abs=1e-3)


@pytest.mark.parametrize(("r", "told"), [("zero", False), ("phases", False), ("general", True)])
def test_the_end_is_told_where_it_does_not_follow_from_the_time(r, told, recwarn):
    class Listening(Student):
        def posterior_mean(self, x_t, t, cond):
            ends.append(self.end)
            return super().posterior_mean(x_t, t, cond)

    ends: list[Tensor | None] = []
    method = make(r=r, sampler="renoise" if r == "zero" else "ode", num_steps=2)
    nets = AnalyticNets({"teacher": GaussianTeacher(FLOW, 0.5), "student": Listening(FLOW)})
    method.student_loss(nets, batch(64, std=0.5), Ctx64())
    assert ends
    assert all((end is not None) == told for end in ends)


def test_a_difference_never_spans_more_than_half_of_the_way():
    """Below 2 h from the end the span is half of it, above it is h."""
    method, spans = make(**SCM, h=0.1), []
    t = torch.tensor([0.02, 0.1, 0.2, 0.5, 0.9], dtype=torch.float64)
    x, student = torch.ones(5, *SHAPE, dtype=torch.float64), Student(FLOW)

    def average(x, s):
        spans.append((t - s).tolist())
        return student(x, s, batch(5).cond).flow

    real = GaussianTeacher(FLOW, 0.5)(x, t, batch(5).cond)
    residual(method.config, 0, average, real, torch.zeros_like(x), torch.zeros_like(t))
    assert spans == [pytest.approx([0.01, 0.05, 0.1, 0.1, 0.1])]


def test_the_law_of_times_is_the_paper_s_by_default():
    """Geng et al. 2025, arXiv:2505.13447: a logit-normal law of (-0.4, 1.0)."""
    assert (MeanFlowConfig().time_mean, MeanFlowConfig().time_std) == (-0.4, 1.0)
