"""PCM against exact flow maps of Gaussian teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from support.jumps import FLOW, SETTINGS, SHAPE, VP, Ctx64, ExactJumper, batch, loss_of, solver_loss

from stepdistill.config.run import RunConfig
from stepdistill.core.method import Setting
from stepdistill.core.solvers import sample_x0
from stepdistill.methods import METHODS
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.consistency_config import ConsistencyConfig
from stepdistill.methods.pcm import PCM, PCMConfig
from stepdistill.methods.segments import jump
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"


def make(setting: str = "flow", **options) -> PCM:
    path, shift = SETTINGS[setting]
    config = PCMConfig(**{"guidance_range": (1.0, 1.0), "loss": "l2", **options})
    return PCM(config, Setting(path, "eps", shift))


def exact(method: PCM, std: float, error=None) -> ExactJumper:
    """A student that knows its phase from t alone, as PCM's does."""

    def end_of(t):
        point = torch.searchsorted(method.segments.points, t - 1e-9)
        return method.segments.time(
            method.segments.lower((point - 1).clamp_min(0), method.config.num_phases)
        )

    return ExactJumper(method.setting.path, std, end_of, error)


@pytest.mark.parametrize("num_phases", [1, 2, 4, 8])
@pytest.mark.parametrize("setting", SETTINGS)
def test_point_mass_has_zero_loss_at_the_exact_map(setting, num_phases):
    method = make(setting, num_phases=num_phases)
    assert loss_of(method, exact(method, 0.0), batch(512), 0.0) < 1e-18


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_at_the_exact_map_is_the_solvers_error(setting):
    losses = []
    for num_grid in (200, 400) if setting != "vp" else (100, 200):
        method = make(setting, num_grid=num_grid)
        losses.append(solver_loss(method, exact(method, 0.5), 0.5, floor=0.2))
    found = float((losses[0] / losses[1]).log() / torch.tensor(4.0).log())
    assert losses[1] > 0
    assert abs(found - 2.0) < 0.25, (losses, found)


@pytest.mark.parametrize("setting", SETTINGS)
def test_points_of_one_trajectory_in_one_phase_jump_to_one_edge_point(setting):
    """Every point of phase 3 of 4 (grid points 21 to 30) lands on the trajectory's edge point."""
    method = make(setting)
    path, data, student = method.setting.path, batch(1, std=0.5), exact(method, 0.5)
    teacher, times = GaussianTeacher(path, 0.5), method.segments.points
    top = times[30:31]
    x_top = path.add_noise(data.x0, Ctx64().randn((1, *SHAPE)), top)
    edge = teacher.flow_map(x_top, top, times[20:21], data.cond)
    for point in range(21, 31):
        t = times[point : point + 1]
        x_t = teacher.flow_map(x_top, top, t, data.cond)
        found = jump(student(x_t, t, data.cond), times[20:21])
        torch.testing.assert_close(found, edge, rtol=1e-9, atol=1e-9)


def test_ends_are_the_edge_of_the_start_s_phase_not_the_stop_s():
    method = make(num_phases=4)
    index = torch.arange(40)
    assert (
        method.draw_end(Ctx64(), index, 4).tolist() == [0] * 10 + [10] * 10 + [20] * 10 + [30] * 10
    )


def test_target_of_a_phase_s_first_interval_is_the_teacher_s_step_itself():
    method, data = make(num_phases=8), batch(512, std=0.5)
    student = GaussianTeacher(FLOW, 0.3)
    seen = []
    call = student.raw
    student.raw = lambda x_t, *args: seen.append(x_t) or call(x_t, *args)
    nets = AnalyticNets({"teacher": GaussianTeacher(FLOW, 0.5), "student": student})
    both = method.jumps(nets, data, Ctx64())
    first = both.index % 5 == 0
    assert 50 < int(first.sum()) < 150
    assert torch.equal(both.target[first], seen[1][first])
    assert not torch.isclose(both.target[~first], seen[1][~first]).all(dim=(1, 2, 3)).any()


@pytest.mark.parametrize("loss", ["l2", "huber"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_one_phase_is_consistency_distillation(setting, loss):
    method = make(setting, num_phases=1, loss=loss, guidance_range=(2.0, 5.0))
    options = {"num_grid": 40, "boundary": "none", "target": "self", "loss": loss}
    cd = Consistency(ConsistencyConfig(guidance_range=(2.0, 5.0), **options), method.setting)
    nets = AnalyticNets(
        {
            "teacher": GaussianTeacher(method.setting.path, 0.5),
            "student": GaussianTeacher(method.setting.path, 0.3),
        }
    )
    data = batch(256, std=0.5)
    ours, theirs = method.student_loss(nets, data, Ctx64()), cd.loss(nets, data, Ctx64())
    assert theirs.total > 1e-7
    torch.testing.assert_close(ours.total, theirs.total, rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_phases", [1, 2, 4, 8])
@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_over_the_edges_are_the_exact_flow(setting, num_phases):
    method, data = make(setting, num_phases=num_phases), batch(std=0.5)
    path, noise = method.setting.path, Ctx64(seed=3).randn((64, *SHAPE))
    found = sample_x0(exact(method, 0.5), method.sampler(), noise, data.cond)
    one, zero = torch.ones(64).double(), torch.zeros(64).double()
    expected = GaussianTeacher(path, 0.5).flow_map(noise, one, zero, data.cond)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
def test_gradient_at_the_solution_is_zero_and_off_it_is_not(setting):
    for offset in (0.0, 0.3):
        theta = torch.tensor(offset, dtype=torch.float64, requires_grad=True)
        method = make(setting)
        student = exact(method, 0.0, lambda t, theta=theta: theta * t)
        loss_of(method, student, batch(), 0.0).backward()
        assert theta.grad.abs() < 1e-9 if offset == 0.0 else theta.grad > 1e-4


def test_travel_on_flow_has_the_kernel_s_variance():
    """From .5 to .75: std sqrt(.75^2 - (.25 / .5)^2 .5^2) = .7071, where PCM's code has .5."""
    t, s = torch.tensor([0.5]), torch.tensor([0.75])
    zero, one = torch.zeros(1, *SHAPE), torch.ones(1, *SHAPE)
    torch.testing.assert_close(float(FLOW.renoise(zero, t, s, one).mean()), 0.5**0.5)


@pytest.mark.parametrize(
    ("num_phases", "expected"), [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])]
)
def test_sampler_visits_the_phase_edges_and_nothing_else(num_phases, expected):
    method = make("vp", num_phases=num_phases)
    spec = method.sampler()
    assert VP.model_time(torch.tensor(spec.times).double()).tolist() == expected
    assert (spec.kind, spec.trained_times) == ("ode", spec.times)
    with pytest.raises(ValueError, match="phase edges"):
        method.sampler(num_phases + 1)


# ------------------------------------------------------------------- stochastic steps, one phase
def test_one_phase_is_sampled_with_fresh_noise_in_any_number_of_steps():
    """PCMFMStochasticScheduler: x0, then (1 - s) x0 + s z at grid indices floor(i K / n)."""
    method = make("flow_shifted", num_grid=100, num_phases=1, sampler="renoise", num_steps=4)
    spec = method.sampler()
    assert (spec.kind, len(spec.trained_times)) == ("renoise", 100)
    assert spec.times == pytest.approx([1.0, 0.9, 0.75, 0.5])
    assert method.sampler(5).num_steps == 5
    data = batch(4)
    student = GaussianTeacher(FLOW, 0.5)
    noise, fresh = torch.randn(2, 4, *SHAPE, dtype=torch.float64).unbind(0)
    x0 = sample_x0(student, spec, noise, data.cond, fresh_noise=lambda i: fresh)
    x = noise
    for t, s in zip(spec.times, (*spec.times[1:], 0.0), strict=True):
        pred = student(x, torch.full((4,), t, dtype=torch.float64), data.cond)
        x = (1.0 - s) * (x - t * pred.flow) + s * fresh
    torch.testing.assert_close(x0, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "renoise", "num_phases": 2}, "num_phases 1 with renoise, got 2"),
        ({"num_steps": 2, "num_phases": 4}, "num_steps: expected 4, the number of phases"),
        ({"num_steps": 41, "num_phases": 1, "sampler": "renoise"}, "at most num_grid = 40"),
        ({"inference_guidance": 3.0, "guidance_range": (5.0, 6.0)}, "guidance would count twice"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


# ------------------------------------------------------------------------------- prompt dropout
def test_prompt_dropout_hides_the_condition_from_all_networks_alike():
    """The authors' --proportion_empty_prompts: one draw per sample, before anything is called."""
    method = make(null_probability=0.3, inference_guidance=7.5, gan={"weight_g": 0.1})
    assert method.sampler().guidance == 7.5
    seen: dict[str, torch.Tensor] = {}

    class Told(GaussianTeacher):
        def __init__(self, name):
            super().__init__(FLOW, 0.5)
            self.name = name

        def posterior_mean(self, x_t, t, cond):
            seen[self.name] = cond["mean"][:, 0, 0, 0]
            return super().posterior_mean(x_t, t, cond)

    class Head(torch.nn.Module):
        def forward(self, features):
            return sum(v.flatten(1).mean(1, keepdim=True) for v in features.values())

    nets = AnalyticNets({n: Told(n) for n in ("teacher", "student")}, {"disc": Head()})
    for loss in (method.student_loss, method.disc_loss):
        seen.clear()
        loss(nets, batch(4096, mean=0.7, null=0.1), Ctx64(seed=1))
        dropped = seen["student"] == 0.1
        assert torch.equal(seen["student"], seen["teacher"])
        assert 0.27 < float(dropped.double().mean()) < 0.33
        assert bool((seen["student"][~dropped] == 0.7).all())


def test_phases_that_cut_the_grid_are_refused():
    with pytest.raises(ValueError, match="Use 40 or 200"):
        make(num_grid=50, num_phases=4)


def test_contract():
    method = make(gan={"weight_g": 0.1})
    assert METHODS["pcm"] is PCM
    assert set(method.roles()) == {"teacher", "student", "disc"}
    assert [p.trains for p in method.phases(0)] == [("disc",), ("student",)]
    assert method.resets(5, 10) == ()


def test_shipped_config_is_valid():
    raw = yaml.safe_load((CONFIGS / "pcm.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="model", **raw)
    method = PCM(PCMConfig(**run.method_config), Setting(VP))
    assert set(run.role_learning_rates) <= set(method.roles())
    assert run.tuning.lora("student") == (64, 8.0), "peft's default, which the code leaves"
    assert method.config.gan.blocks == ("all",)
