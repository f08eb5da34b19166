"""TSCD against exact flow maps of Gaussian teachers, its stages, and its samplers."""

from __future__ import annotations

import pytest
import torch
from support.jumps import (
    FLOW,
    SETTINGS,
    SHAPE,
    VP,
    Ctx64,
    ExactJumper,
    Linear,
    batch,
    loss_of,
    solver_loss,
)

from stepdistill.config.layers import layers_of, merged
from stepdistill.config.run import RunConfig
from stepdistill.core.method import Setting
from stepdistill.core.path import expand
from stepdistill.core.solvers import sample_x0, teacher_step
from stepdistill.core.types import Batch
from stepdistill.losses.regression import pseudo_huber
from stepdistill.methods import METHODS
from stepdistill.methods.segments import jump
from stepdistill.methods.trajectory import Jumps
from stepdistill.methods.tscd import TSCD
from stepdistill.methods.tscd_config import TSCDConfig
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher


class Told(TSCD):
    """TSCD that remembers the ends it drew, for students that must know them."""

    def draw_end(self, ctx, index, k):
        self.points = super().draw_end(ctx, index, k)
        self.index = index
        return self.points

    def end_of(self, t):
        return self.segments.time(self.points)


def make(setting: str = "flow", **options) -> Told:
    path, shift = SETTINGS[setting]
    return Told(
        TSCDConfig(**{"guidance_range": (1.0, 1.0), "loss": "l2", **options}),
        Setting(path, "eps", shift),
    )


# ------------------------------------------------------------------- the loss at the solution
@pytest.mark.parametrize("step", [0, 300, 600, 900])
@pytest.mark.parametrize("setting", SETTINGS)
def test_point_mass_has_zero_loss_at_the_exact_map(setting, step):
    method = make(setting)
    student = ExactJumper(method.setting.path, 0.0, method.end_of)
    assert loss_of(method, student, batch(), 0.0, step=step) < 1e-18


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_at_the_exact_map_is_the_solvers_error(setting):
    """l2 of one DDIM step's local error O(h^2): halving h divides the loss by 4^2."""
    losses = []
    for num_grid in (200, 400) if setting != "vp" else (250, 500):
        method = make(setting, num_grid=num_grid, segments=(2, 1))
        student = ExactJumper(method.setting.path, 0.5, method.end_of)
        losses.append(solver_loss(method, student, 0.5, floor=0.2))
    found = float((losses[0] / losses[1]).log() / torch.tensor(4.0).log())
    assert losses[1] > 0
    assert abs(found - 2.0) < 0.25, (losses, found)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradient_off_the_solution_has_its_closed_form(setting):
    """x0 = mu + theta t moves a jump by theta t c, c = alpha_e - sigma_e alpha_t / sigma_t."""
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    method = make(setting)
    student = ExactJumper(method.setting.path, 0.0, method.end_of, lambda t: theta * t)
    loss = loss_of(method, student, batch(256), 0.0)
    loss.backward()
    (t, s), e = method.grid.pair(method.index), method.segments.time(method.points)

    def moved(time):
        (alpha, sigma), (alpha_e, sigma_e) = (method.setting.path.coeffs(x) for x in (time, e))
        gain = time * (alpha_e - sigma_e * alpha / sigma.clamp_min(1e-12))
        return torch.where(time == e, 0.0, gain)

    error = moved(t) - moved(s)
    torch.testing.assert_close(loss.item(), float(0.09 * (error**2).mean()))
    torch.testing.assert_close(float(theta.grad), float(0.6 * (moved(t) * error).mean()))


def test_gradient_is_zero_at_the_solution():
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    method = make("vp")
    student = ExactJumper(VP, 0.0, method.end_of, lambda t: theta * t)
    loss_of(method, student, batch(), 0.0).backward()
    assert theta.grad.abs() < 1e-9


def test_fixed_guidance_gives_the_guided_gaussian():
    """mu' = mu_u + g (mu_c - mu_u): only the map of the guided mean has zero loss."""
    method, data = make("flow", guidance_range=(3.0, 3.0)), batch(256)
    guided, plain = (ExactJumper(FLOW, 0.0, method.end_of, scale=g) for g in (3.0, 1.0))
    assert loss_of(method, guided, data, 0.0) < 1e-18
    assert loss_of(method, plain, data, 0.0) > 1e-5


# -------------------------------------------------------------------- k = 1 and one segment alone
@pytest.mark.parametrize("loss", ["l2", "huber"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_one_segment_is_trajectory_consistency(setting, loss):
    """TCD's loss by hand: any end from 0 to t_{n-1}, both sides by DDIM, target without grad."""
    method = make(setting, segments=(1,), loss=loss, guidance_range=(2.0, 5.0))
    path, data = method.setting.path, batch(512, std=0.5)
    student = GaussianTeacher(path, 0.3)
    found = loss_of(method, student, data, 0.5)

    ctx, points = Ctx64(seed=1), torch.cat([torch.zeros(1), method.grid.starts]).double()
    n = ctx.randint(1, 41, 512)
    g, noise = 2.0 + 3.0 * ctx.rand(512), ctx.randn((512, *SHAPE))
    m = (ctx.rand(512) * n).long()
    t, s, e = points[n], points[n - 1], points[m]
    x_t = path.add_noise(data.x0, noise, t)
    x_t = torch.where(expand(t, x_t) == 1.0, noise, x_t)  # sampling starts from noise alone
    x_s = teacher_step(GaussianTeacher(path, 0.5), x_t, t, s, data.cond, data.null, g)
    estimate = student(x_t, t, data.cond).step(e)
    target = student(x_s, s, data.cond).step(e)
    error = (estimate - target) ** 2 if loss == "l2" else pseudo_huber(estimate, target)
    torch.testing.assert_close(found, error.mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_jumps_compose(setting):
    """t -> s -> e equals t -> e, for jumps by the exact map."""
    path, data = make(setting).setting.path, batch(std=0.5)
    t, s, e = (torch.full((64,), x).double() for x in (0.9, 0.5, 0.2))
    x_t = path.add_noise(data.x0, Ctx64().randn((64, *SHAPE)), t)

    def to(x, now, then):
        return jump(ExactJumper(path, 0.5, lambda _: then)(x, now, data.cond), then)

    torch.testing.assert_close(to(to(x_t, t, s), s, e), to(x_t, t, e), rtol=1e-9, atol=1e-9)


def test_ends_stay_inside_the_stage_s_segments():
    method = make(num_grid=40)
    for step, k in ((0, 8), (250, 4), (500, 2), (750, 1)):
        loss_of(method, GaussianTeacher(FLOW, 0.5), batch(512, std=0.5), 0.5, step=step)
        low = method.segments.lower(method.index, k)
        assert bool(((low <= method.points) & (method.points <= method.index)).all())
        assert bool((method.points < method.index).any()), "ends are spread, not the next point"
        assert len(set((method.index // (40 // k)).tolist())) == k


def test_target_is_the_stepped_point_at_its_own_time_without_gradient():
    method, data = make(target="ema"), batch(std=0.5)
    student, target = (ExactJumper(FLOW, 0.5, method.end_of) for _ in range(2))
    teacher = GaussianTeacher(FLOW, 0.5)
    nets = AnalyticNets({"teacher": teacher, "student": student, "target": target})
    both = method.jumps(nets, data, Ctx64(max_steps=1000))
    ((x_t, t),), ((x_s, s),) = student.seen, target.seen
    assert torch.equal(torch.stack([t, s]), torch.stack(method.grid.pair(method.index)))
    assert torch.equal(x_s, teacher_step(teacher, x_t, t, s, data.cond, None, 1.0))
    assert not both.target.requires_grad
    stays = both.end == both.index
    assert torch.equal(both.target[stays], x_s[stays])
    method.after(nets, 0)
    assert nets.ema_calls == [("target", 0.95)]
    make(target="self").after(nets, 0)
    assert len(nets.ema_calls) == 1


def test_offset_noise_shifts_whole_channels():
    """Noise n + a m with m constant over a channel: variance 1 + a^2, channel mean 1 / 4 + a^2."""
    method = make(noise_offset=0.5)
    student = ExactJumper(FLOW, 0.0, method.end_of)
    loss_of(method, student, batch(8192, mean=0.0), 0.0)
    x_t, t = student.seen[0]
    noise = x_t / expand(t, x_t)
    torch.testing.assert_close(float(noise.var()), 1.25, rtol=0.03, atol=0)
    torch.testing.assert_close(float(noise.mean((2, 3)).var()), 0.5, rtol=0.05, atol=0)


# ------------------------------------------------------------------------------ adversarial term
@pytest.mark.parametrize(("step", "scale"), [(0, 0.0), (500, 1.0), (900, 3.0)])
def test_adversarial_weight_follows_the_stage(step, scale):
    method = make(gan={"weight_g": 0.5, "loss": "hinge"}, gan_scale=(0.0, 0.5, 1.0, 3.0))
    student = GaussianTeacher(FLOW, 0.3)
    nets = AnalyticNets(
        {"teacher": GaussianTeacher(FLOW, 0.5), "student": student}, {"disc": Linear()}
    )
    losses = method.student_loss(nets, batch(std=0.5), Ctx64(step=step, max_steps=1000))
    adversarial = losses.logs.get("gan_g", torch.zeros(()))
    assert ("gan_g" in losses.logs) == (scale > 0)
    torch.testing.assert_close(
        losses.total, losses.logs["loss"] + 0.5 * scale * adversarial, rtol=1e-9, atol=0
    )


@pytest.mark.parametrize(("step", "scale"), [(0, 1.0), (500, 0.5), (900, 0.0)])
def test_weight_of_the_distance_follows_the_stage(step, scale):
    """Hyper-SD: the MSE counts most at 8 and 4 segments, the adversarial term at 2 and 1."""
    method = make(gan={"weight_g": 0.5, "loss": "hinge"}, loss_scale=(1.0, 1.0, 0.5, 0.0))
    nets = AnalyticNets(
        {"teacher": GaussianTeacher(FLOW, 0.5), "student": GaussianTeacher(FLOW, 0.3)},
        {"disc": Linear()},
    )
    losses = method.student_loss(nets, batch(std=0.5), Ctx64(step=step, max_steps=1000))
    assert losses.logs["loss"] > 1e-6
    expected = scale * losses.logs["loss"] + 0.5 * losses.logs["gan_g"]
    torch.testing.assert_close(losses.total, expected, rtol=1e-9, atol=0)


def test_adversarial_gradient_reaches_the_student_through_frozen_features():
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    method = make(gan={"weight_g": 1.0, "loss": "hinge"})
    student = ExactJumper(FLOW, 0.0, method.end_of, lambda t: theta * t)
    nets = AnalyticNets(
        {"teacher": GaussianTeacher(FLOW, 0.0), "student": student}, {"disc": Linear()}
    )
    method.student_loss(nets, batch(), Ctx64(max_steps=1000)).total.backward()
    assert theta.grad < -1e-3  # w > 0: the head likes larger values


def test_the_head_s_update_gives_the_student_nothing():
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    method, head = make(gan={"weight_g": 1.0}), Linear()
    student = ExactJumper(FLOW, 0.0, method.end_of, lambda t: theta * t)
    nets = AnalyticNets({"teacher": GaussianTeacher(FLOW, 0.5), "student": student}, {"disc": head})
    method.disc_loss(nets, batch(std=0.5), Ctx64(max_steps=1000)).total.backward()
    assert theta.grad is None
    assert head.w.grad is not None


def test_the_head_s_loss_counts_with_its_weight():
    method = make(gan={"weight_g": 1.0, "weight_d": 0.25})
    nets = AnalyticNets(
        {"teacher": GaussianTeacher(FLOW, 0.5), "student": GaussianTeacher(FLOW, 0.3)},
        {"disc": Linear()},
    )
    losses = method.disc_loss(nets, batch(std=0.5), Ctx64(max_steps=1000))
    torch.testing.assert_close(losses.total, 0.25 * losses.logs["gan_d"], rtol=1e-9, atol=0)


def test_head_cannot_tell_an_exact_student_under_one_noise():
    method = make(gan={"weight_g": 1.0, "same_noise": True})
    student = ExactJumper(FLOW, 0.0, method.end_of)
    nets = AnalyticNets(
        {"teacher": GaussianTeacher(FLOW, 0.0), "student": student}, {"disc": Linear()}
    )
    logs = method.disc_loss(nets, batch(), Ctx64(max_steps=1000)).logs
    torch.testing.assert_close(logs["logit_real"], logs["logit_fake"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
def test_noise_travel_keeps_the_marginal_variance(setting):
    """Samples of the marginal at e, carried to t, have the marginal's variance at t."""
    method = make(setting, segments=(4,), gan={"weight_g": 1.0})
    path, n = method.setting.path, 4096
    data: Batch = batch(n, mean=0.0, std=0.5)
    index = torch.full((n,), 29)  # third segment: its edge is point 20
    end = method.segments.lower(index, 4)
    x_e = path.add_noise(data.x0, Ctx64(seed=7).randn((n, *SHAPE)), method.segments.time(end))
    for noised, t, _ in method.carry(Jumps(x_e, x_e, end, index), data, Ctx64(max_steps=1000)):
        alpha, sigma = path.coeffs(t)
        whitened = noised / expand((0.25 * alpha**2 + sigma**2).sqrt(), noised)
        assert bool((t >= method.segments.time(end)).all())
        for part in (t <= t.median(), t > t.median()):
            torch.testing.assert_close(float(whitened[part].var()), 1.0, rtol=0.04, atol=0)


# ------------------------------------------------------------------------------------ stages
def stages(max_steps: int, **options) -> list[int]:
    method = make(**options)
    return [method.num_segments(step, max_steps) for step in range(max_steps)]


def test_stages_by_default_are_equal_parts():
    assert stages(8) == [8, 8, 4, 4, 2, 2, 1, 1]


def test_stages_by_fraction_and_by_step():
    expected = [4] * 3 + [2] * 6 + [1] * 21
    assert stages(30, segments=(4, 2, 1), stage_starts=(0.1, 0.3)) == expected
    assert stages(30, segments=(4, 2, 1), stage_starts=(3, 9)) == expected


@pytest.mark.parametrize("max_steps", range(1, 50))
def test_a_run_of_any_length_starts_in_the_first_stage_and_never_goes_back(max_steps):
    found = stages(max_steps)
    assert found[0] == 8
    assert found == sorted(found, reverse=True)
    if max_steps >= 4:
        assert set(found) == {8, 4, 2, 1}


def test_resets_come_at_stage_switches_alone():
    method = make(target="ema", gan={"weight_g": 0.1})
    resets = {step: method.resets(step, 8) for step in range(8)}
    assert {step for step, roles in resets.items() if roles} == {2, 4, 6}
    assert resets[2] == ("student", "disc")
    assert make().resets(2, 8) == ("student",)


def test_explicit_stages_beyond_the_run_are_refused():
    with pytest.raises(ValueError, match="below max_train_steps 30"):
        make(segments=(2, 1), stage_starts=(30,)).num_segments(0, 30)


# ----------------------------------------------------------------------------------- sampler
@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (1, [999]),
        (2, [999, 499]),
        (4, [999, 749, 499, 249]),
        (8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ],
)
@pytest.mark.parametrize("sampler", ["ode", "tcd"])
def test_sampler_visits_the_trailing_timesteps(num_steps, expected, sampler):
    spec = make("vp", sampler=sampler).sampler(num_steps)
    assert VP.model_time(torch.tensor(spec.times).double()).tolist() == expected
    assert (spec.kind, spec.gamma) == (sampler, 0.3 if sampler == "tcd" else 0.0)
    assert len(spec.trained_times) == 40


def test_steps_that_would_cross_an_edge_are_refused():
    method = make(segments=(8, 4))
    assert method.sampler().num_steps == 4
    assert method.sampler(20).num_steps == 20
    for num_steps in (0, 1, 2, 6, 44):
        with pytest.raises(ValueError, match="every segment edge"):
            method.sampler(num_steps)


def test_a_run_cut_short_is_sampled_with_the_edges_it_was_trained_on():
    method = make(num_steps=1)
    found = [method.sampler_at(step, 8).num_steps for step in range(9)]
    assert found == [1, 8, 8, 4, 4, 2, 2, 1, 1], "of the last update; before any, the plan's"
    assert method.sampler_at(3, 8) == method.sampler(4)
    assert make(num_steps=4).sampler_at(8, 8).num_steps == 4
    assert method.sampler_at(4, 8, 8).times == method.sampler(8).times
    with pytest.raises(ValueError, match="a multiple of 4"):
        method.sampler_at(4, 8, 2)


@pytest.mark.parametrize("sampler", ["ode", "tcd"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_exact_student_samples_the_data_in_any_number_of_steps(setting, sampler):
    method, data = make(setting, sampler=sampler), batch()
    student = GaussianTeacher(method.setting.path, 0.0)
    for num_steps in (1, 2, 4, 8):
        x0 = sample_x0(
            student,
            method.sampler(num_steps),
            torch.randn_like(data.x0),
            data.cond,
            fresh_noise=lambda i: torch.randn_like(data.x0),
        )
        torch.testing.assert_close(x0, data.x0, rtol=0, atol=1e-9)


# ------------------------------------------------------------------------- errors and contract
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_grid": 50}, "Use 40 or 200"),
        ({"segments": (4, 8)}, "falling counts"),
        ({"segments": (6, 4)}, "falling counts"),
        ({"segments": ()}, "falling counts"),
        ({"stage_starts": (0.5,)}, "3 rising numbers"),
        ({"stage_starts": (0.5, 0.4, 0.6)}, "3 rising numbers"),
        ({"stage_starts": (0.5, 2, 3)}, "all fractions"),
        ({"stage_starts": (1.5, 2, 3)}, "whole steps"),
        ({"gan_scale": (1.0,), "gan": {"weight_g": 0.1}}, "4 factors"),
        ({"loss_scale": (1.0, -1.0, 1.0, 1.0)}, "loss_scale: expected 4 factors"),
        ({"loss_scale": (1.0, 1.0, 1.0, 0.0)}, "stage 4 would train on nothing"),
        ({"num_steps": 3, "segments": (2,)}, "multiple of the last"),
        ({"guidance_range": (5.0, 4.0)}, "low <= high"),
        ({"gan": {"source": "fake"}}, "teacher"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_scale_without_a_term_warns():
    with pytest.warns(UserWarning, match="no effect"):
        make(gan_scale=(1.0, 1.0, 1.0, 1.0))


def test_a_grid_that_does_not_divide_the_table_is_refused():
    with pytest.raises(ValueError, match="divisor of the 1000-step"):
        make("vp", num_grid=48)


def test_contract():
    method = make(target="ema", gan={"weight_g": 0.1})
    assert METHODS["tscd"] is TSCD
    assert method.needs == {"x0", "cond"}
    assert set(method.roles()) == {"teacher", "student", "target", "disc"}
    assert [p.trains for p in method.phases(0)] == [("disc",), ("student",)]
    assert [p.trains for p in make().phases(0)] == [("student",)]


@pytest.mark.parametrize("recipe", [(), ("sd15-tscd-one-lora",)])
def test_shipped_configs_are_valid(recipe):
    raw = merged([layer for name in ("tscd", *recipe) for layer in layers_of(name)])
    run = RunConfig(pretrained_model_name_or_path="model", **raw)
    method = TSCD(TSCDConfig(**run.method_config), Setting(VP))
    assert method.num_segments(0, run.max_train_steps) == 8
    assert method.num_segments(run.max_train_steps - 1, run.max_train_steps) == 1
    assert method.sampler().kind == ("tcd" if recipe else "ode")
    assert run.tuning.lora("student") == (64, 64.0)
