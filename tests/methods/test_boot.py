"""BOOT against exact trajectories of Gaussian teachers: the fixed point, gradients off it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support.jumps import FLOW, SETTINGS, SHAPE, VP, Ctx64, batch
from torch import Tensor

from stepdistill.config.run import RunConfig
from stepdistill.core.method import Setting
from stepdistill.core.path import VEPath, VPPath, expand
from stepdistill.core.solvers import sample_x0
from stepdistill.core.types import Cond
from stepdistill.methods import METHODS
from stepdistill.methods.boot import BOOT
from stepdistill.methods.boot_config import BOOTConfig
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
VE = VEPath()
PATHS = {**SETTINGS, "ve": (VE, 1.0)}


def make(setting: str = "flow", kind: str = "v", **options) -> BOOT:
    path, shift = PATHS[setting]
    plain = {"guidance": 1.0, "weight": "none"}
    return BOOT(BOOTConfig(**{**plain, **options}), Setting(path, kind, shift))


class Student(AnalyticDenoiser):
    """The exact signal of the trajectory that a noise begins, plus an error.

    x_1 = alpha f + sigma eps, f the teacher's x0 of pure noise: where the boundary has it begin.
    """

    def __init__(self, method: BOOT, std: float, error: Tensor | float = 0.0, scale: float = 1.0):
        super().__init__(method.setting.path, "x0")
        self.method, self.std, self.error, self.scale = method, std, error, scale

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        method, path = self.method, self.path
        teacher, cond = GaussianTeacher(path, self.std), Cond({"mean": self.scale * cond["mean"]})
        point = (method.told[None] - t[:, None]).abs().argmin(1)
        level = path.coeffs(t)[1] if path is VE else torch.ones_like(t)
        eps, one = x_t / expand(level, x_t), torch.ones_like(t)
        first = teacher.posterior_mean(path.prior(eps), one, cond)
        s = torch.cat([method.grid.stops[:1], method.grid.starts])[point]
        x_s = teacher.flow_map(path.add_noise(first, eps, one), one, s, cond)
        alpha, sigma = (expand(c, x_s) for c in path.coeffs(s))
        at_start = (point == method.config.num_grid).view(-1, *[1] * (x_s.ndim - 1))
        return torch.where(at_start, first, (x_s - sigma * eps) / alpha) + self.error


def loss_of(method: BOOT, student: AnalyticDenoiser, std: float, bsz: int = 64, kind="x0", **more):
    nets = AnalyticNets(
        {"teacher": GaussianTeacher(method.setting.path, std, kind), "student": student}
    )
    (phase,) = method.phases(0)
    return phase.loss(nets, replace(batch(bsz), x0=None, **more), Ctx64(seed=1)).total


# ------------------------------------------------------------------------------ at the solution
@pytest.mark.parametrize("solver", ["ddim", "heun"])
@pytest.mark.parametrize("setting", PATHS)
def test_point_mass_has_zero_loss_at_the_exact_signal(setting, solver) -> None:
    """All trajectories end at one image, which every signal on the way is."""
    method = make(setting, solver=solver)
    assert loss_of(method, Student(method, 0.0), 0.0) < 1e-18


@pytest.mark.parametrize(
    ("setting", "solver", "order"),
    [
        ("flow", "ddim", 1.5),
        ("vp", "ddim", 1.5),
        ("ve", "ddim", 2.0),  # alpha is 1 throughout
        ("flow", "heun", 2.5),
    ],
)
def test_loss_at_the_exact_signal_falls_with_the_solver_s_order(setting, solver, order) -> None:
    """Halving the spacing divides the loss by 4^order. At the start, a share h of the samples, y
    has the error h^2 (h^3 with Heun) of x over alpha = h: l2 of h^3 (h^5) in all."""
    losses = []
    for num_grid in (250, 500):
        method = make(setting, num_grid=num_grid, solver=solver)
        losses.append(loss_of(method, Student(method, 0.5), 0.5, bsz=4096))
    found = float((losses[0] / losses[1]).log() / torch.tensor(4.0).log())
    assert losses[1] > 0
    assert abs(found - order) < 0.15, (losses, found)


def test_one_call_ends_where_the_teacher_s_trajectory_does() -> None:
    """Of N(mean, std^2) the exact student's x0 is mean + std eps, but for the start's trace."""
    for setting in PATHS:
        method = make(setting)
        data = batch(512)
        noise = Ctx64(seed=3).randn((512, *SHAPE))
        x0 = sample_x0(Student(method, 0.5), method.sampler(), noise, data.cond)
        # Through the start's rest of std: sqrt(V) of alpha f + sigma eps against that of data.
        assert float((x0 - (0.7 + 0.5 * noise)).abs().max()) < 0.02, setting


def test_the_start_is_the_teacher_s_first_prediction() -> None:
    method = make("vp")
    student, data = Student(method, 0.5), batch(8)
    eps = Ctx64(seed=2).randn((8, *SHAPE))
    point = torch.full((8,), method.config.num_grid)
    nets = AnalyticNets({"student": student})
    y = method.signal(nets, eps, point, data.cond)
    f = GaussianTeacher(VP, 0.5)(eps, torch.ones(8, dtype=torch.float64), data.cond).x0
    torch.testing.assert_close(y, f, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("setting", "kind"),
    [("vp", "eps"), ("vp", "v"), ("vp", "flow"), ("flow", "v"), ("flow", "flow"), ("ve", "eps")],
)
def test_teachers_of_every_kind_give_the_same_loss(setting, kind) -> None:
    method = make(setting)
    student = Student(method, 0.5, error=0.3)
    expected = loss_of(method, student, 0.5)
    assert float(loss_of(method, student, 0.5, kind=kind)) == pytest.approx(float(expected))


def test_the_guided_teacher_is_inside_both_targets() -> None:
    """Null mean 0 and guidance 3: the signal of three times the mean has no loss."""
    method = make(guidance=3.0)
    assert loss_of(method, Student(method, 0.0, scale=3.0), 0.0) < 1e-18
    assert loss_of(method, Student(method, 0.0), 0.0) > 0.1


# -------------------------------------------------------------------------------- off the solution
@pytest.mark.parametrize("weight", ["none", "rate"])
@pytest.mark.parametrize("setting", PATHS)
def test_gradient_at_a_shifted_signal_has_its_closed_form(setting, weight) -> None:
    """g = y + theta: the step keeps l_s / l_t of theta, so the rest k theta is what is unlearned,
    d loss / d theta = 2 theta mean(w k), k = 1 - l_s / l_t; at the start k = 1."""
    options = {"boundary_share": 0.25, "boundary_weight": 3.0, "weight": weight, "num_grid": 20}
    method = make(setting, **options)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss_of(method, Student(method, 0.0, error=theta), 0.0).backward()
    ctx = Ctx64(seed=1)
    ctx.randn((64, *SHAPE))
    t, s = method.grid.pair(ctx.randint(0, 20, 64))
    at_start = ctx.stratified(64) < 0.25
    (alpha_t, sigma_t), (alpha, sigma) = (method.setting.path.coeffs(u) for u in (t, s))
    k = torch.where(at_start, 1.0, 1.0 - sigma * alpha_t / (alpha * sigma_t))
    w = torch.where(at_start, 3.0 / 0.25, 1.0 / 0.75)
    if weight == "rate":
        w = w / k**2
    assert at_start.sum() == 16
    assert float(theta.grad) == pytest.approx(2 * 0.3 * float((w * k).mean()), rel=1e-6)
    assert theta.grad > 0


def test_no_gradient_goes_through_the_target() -> None:
    """With error b t in place of a shift: the gradient is the answer's alone, 2 b mean(w r u)."""
    method = make("flow", num_grid=4, boundary_share=1e-9, told_times=(1.0, 0.5))
    b = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    class Tilted(Student):
        def posterior_mean(self, x_t, t, cond):
            return super().posterior_mean(x_t, t, cond) + expand(b * t, x_t)

    loss_of(method, Tilted(method, 0.0), 0.0).backward()
    ctx = Ctx64(seed=1)
    ctx.randn((64, *SHAPE))
    index = ctx.randint(0, 4, 64)
    t, s = method.grid.pair(index)
    told_t, told_s = method.told[index + 1], method.told[index]
    kept = s * (1 - t) / ((1 - s) * t)
    expected = 2 * 0.5 * ((told_s - kept * told_t) * told_s).mean()
    assert float(b.grad) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.full
def test_training_in_closed_form_reaches_the_trajectory() -> None:
    """y = a_j mu + b_j eps at each grid point, by gradient descent: the chain of DDIM's steps."""
    method = make("flow", num_grid=4, boundary_share=0.3)
    own = torch.zeros(5, 2, dtype=torch.float64, requires_grad=True)

    class Linear(AnalyticDenoiser):
        def posterior_mean(self, x_t, t, cond):
            point = (method.told[None] - t[:, None]).abs().argmin(1)
            a, b = (expand(own[point, i], x_t) for i in (0, 1))
            return a * cond["mean"] + b * x_t

    optimiser, student = torch.optim.Adam([own], lr=0.05), Linear(FLOW, "x0")
    nets = AnalyticNets({"teacher": GaussianTeacher(FLOW, 0.5), "student": student})
    data = replace(batch(64), x0=None)
    for step in range(250):
        optimiser.zero_grad()
        method.loss(nets, data, Ctx64(seed=1, step=step)).total.backward()
        optimiser.step()
        if step == 150:
            optimiser.param_groups[0]["lr"] = 0.01
    # DDIM from x_1 = eps: alpha is 0 at t = 1 of a flow path.
    eps = torch.ones(1, *SHAPE, dtype=torch.float64)
    ends = {}
    for mean in (0.0, 1.0):
        cond = Cond({"mean": torch.full((1, *SHAPE), mean, dtype=torch.float64)})
        x = eps
        for t, s in ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
            at = torch.tensor([t]).double(), torch.tensor([s]).double()
            x = GaussianTeacher(FLOW, 0.5)(x, at[0], cond).step(at[1])
        ends[mean] = float(x.mean())
    expected = [ends[1.0] - ends[0.0], ends[0.0]]
    assert own[0].tolist() == pytest.approx(expected, abs=0.02)


# ------------------------------------------------------------------------- what the student is told
def test_the_student_is_told_even_times_of_the_table_and_sees_noise_of_their_level() -> None:
    method = make("vp", told_times=(0.626, 1.0), num_grid=50)
    indices = VP.model_time(method.told)
    assert indices.tolist() == indices.round().tolist()
    assert (indices[0], indices[-1]) == (625.0, 999.0)
    assert method.sampler().times == (0.626,)
    seen = {}
    for setting in ("vp", "ve"):

        class Spy(Student):
            def raw(self, x_t, t, cond, w, features):
                seen[self.path] = float((x_t / self.path.prior(torch.ones(1).double())).std())
                return super().raw(x_t, t, cond, w, features)

        made = make(setting)
        point = torch.full((64,), 50)
        eps = Ctx64().randn((64, *SHAPE))
        made.signal(AnalyticNets({"student": Spy(made, 0.5)}), eps, point, batch().cond)
    assert seen[VP] == pytest.approx(1.0, abs=0.1)
    assert seen[VE] == pytest.approx(0.5**7, abs=0.1 * 0.5**7)


@pytest.mark.parametrize(
    ("setting", "options", "message"),
    [
        ("flow", {"num_steps": 2}, "num_steps: expected 1 .* got 2"),
        ("flow", {"told_times": (1.0, 1.0)}, "told_times: expected two different times"),
        ("flow", {"told_times": (0.0, 1.0)}, "told_times: expected two different times"),
        ("flow", {"told_times": (1.0, 1.1)}, "told_times: expected two different times"),
        ("vp", {"told_times": (1.0, 0.96)}, "told_times: .*num_grid = 50 of them apart"),
        ("vp", {"told_times": (0.6254, 1.0)}, "told_times: .*that the teacher knows"),
        ("ve", {"told_times": (0.5, 1.0)}, "told_times: expected to begin at 1 on a VE path"),
        ("vp", {"num_grid": 48}, "num_grid: expected a divisor"),
        ("flow", {"boundary_share": 0.0}, "boundary_share"),
        ("flow", {"boundary_share": 1.0}, "boundary_share"),
    ],
)
def test_what_cannot_be_trained_is_refused(setting, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(setting, **options)


def test_the_closest_table_times_that_are_enough_are_taken() -> None:
    assert len(set(make("vp", told_times=(1.0, 0.95)).told.tolist())) == 51


def test_another_number_of_steps_is_refused_and_one_is_not() -> None:
    method = make()
    assert method.sampler(1) == method.sampler()
    with pytest.raises(ValueError, match=r"num_steps: expected 1 .* got 4"):
        method.sampler(4)


@pytest.mark.parametrize(
    ("setting", "kind", "ends"),
    [
        ("vp", "v", (0.5, 1.0)),
        ("vp", "x0", (0.5, 1.0)),
        ("flow", "flow", (0.5, 1.0)),
        ("vp", "eps", (1.0, 0.5)),
        ("ve", "x0", (1.0, 0.5)),
    ],
)
def test_the_default_begins_where_the_network_answers_noise(setting, kind, ends) -> None:
    told = make(setting, kind).told
    assert (float(told[0]), float(told[-1])) == ends
    assert make(setting, kind, told_times=(1.0, 0.25)).told[-1] == 0.25


def test_a_table_of_zero_terminal_snr_has_finite_targets() -> None:
    angle = torch.linspace(0.05, torch.pi / 2, 100, dtype=torch.float64)
    path = VPPath(angle.cos() ** 2)
    method = BOOT(BOOTConfig(guidance=1.0, weight="rate"), Setting(path, "v"))
    assert loss_of(method, Student(method, 0.0), 0.0) < 1e-18


def test_settings_file_is_valid() -> None:
    text = yaml.safe_load((CONFIGS / "boot.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="x", **text)
    assert METHODS[run.method].Config(**run.method_config).weight == "rate"
