"""CTM and TCD against exact flow maps of Gaussian teachers: loss, gradient, samplers."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from support.jumps import SETTINGS, SHAPE, VP, Ctx64, ExactJumper, Linear, batch
from torch import Tensor

from stepdistill.config.files import method_config
from stepdistill.core.method import Method, Setting
from stepdistill.core.path import FlowPath, VEPath, expand
from stepdistill.core.solvers import sample_x0
from stepdistill.core.types import Cond
from stepdistill.losses.rewards import LPIPSOptions
from stepdistill.methods import METHODS
from stepdistill.methods.ctm import CTM
from stepdistill.methods.ctm_config import CTMConfig
from stepdistill.methods.tscd import TSCD
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher

PATHS = {**SETTINGS, "ve": (VEPath(), 1.0)}
EXACT = {"vp": 1e-18, "flow": 1e-20, "flow_shifted": 1e-20, "ve": 1e-12}  # sigma_max is 80


def make(setting: str = "flow", cls: type[Method] = CTM, **options) -> CTM:
    path, shift = PATHS[setting]
    more = {"loss": "l2", "end_input": True} if cls is CTM else {"segments": (1,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = cls.Config(**{"guidance_range": (1.0, 1.0), **more, **options})
        return cls(config, Setting(path, "eps", shift))  # type: ignore[return-value]


def solver(method: CTM, std: float = 0.5) -> ExactJumper:
    """A teacher whose DDIM steps on the method's grid are the exact flow map's."""
    points = method.segments.points
    return ExactJumper(
        method.setting.path, std, lambda t: points[torch.searchsorted(points, t - 1e-12) - 1]
    )


def loss_of(method: CTM, nets: dict, bsz: int = 64, **ctx) -> Tensor:
    path = method.setting.path
    nets = {"teacher": solver(method), "target": ExactJumper(path, 0.5), **nets}
    return method.student_loss(AnalyticNets(nets), batch(bsz, std=0.5), Ctx64(**ctx)).total


# ------------------------------------------------------------------------- the trajectory function
@pytest.mark.parametrize("setting", PATHS)
def test_jumps_stay_where_they_end_and_compose(setting):
    """G(x, t, t) = x bit for bit, for any network; G(G(x, t, u), u, s) = G(x, t, s) if exact."""
    method, data = make(setting), batch(std=0.5)
    path = method.setting.path
    nets = AnalyticNets({"student": ExactJumper(path, 0.5), "other": GaussianTeacher(path, 0.2)})
    t, u, s, clean = (torch.full((64,), x).double() for x in (0.9, 0.5, 0.2, 0.0))
    x_t = path.add_noise(data.x0, Ctx64().randn((64, *SHAPE)), t)

    def to(x, now, then, role="student"):
        return method.reach(nets, role, x, now, then, data.cond)

    for role in ("student", "other"):
        assert torch.equal(to(x_t, t, t, role), x_t)
        assert torch.equal(to(x_t, clean, clean, role), x_t)
    for end in (s, clean):
        torch.testing.assert_close(to(to(x_t, t, u), u, end), to(x_t, t, end), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("steps", [1, 8, 40])
@pytest.mark.parametrize("setting", PATHS)
def test_the_exact_trajectory_has_zero_loss(setting, steps):
    """Local, soft and global consistency, at every end, with a solver that does not err."""
    method = make(setting, solver_steps=steps)
    for seed in range(3):
        student = ExactJumper(method.setting.path, 0.5)
        assert loss_of(method, {"student": student}, seed=seed) < EXACT[setting]
    wrong = ExactJumper(method.setting.path, 0.4)
    assert loss_of(method, {"student": wrong}) > 1e-4


@pytest.mark.parametrize("setting", PATHS)
def test_tcd_told_its_ends_has_zero_loss_there_too(setting):
    method = make(setting, TSCD, end_input=True, loss="l2", target="ema")
    path = method.setting.path
    assert loss_of(method, {"student": ExactJumper(path, 0.5)}) < EXACT[setting]
    assert loss_of(method, {"student": ExactJumper(path, 0.4)}) > 1e-4


def test_its_loss_there_is_the_solvers_error():
    """Over all the intervals, Heun's is a small part of DDIM's, and falls by 4^4 at h / 4."""

    def loss(solver_kind: str, num_grid: int) -> float:
        method = make(solver=solver_kind, num_grid=num_grid, solver_steps=num_grid)
        path = method.setting.path
        nets = {"teacher": GaussianTeacher(path, 0.5), "student": ExactJumper(path, 0.5)}
        return float(loss_of(method, nets, seed=3))

    coarse, fine = loss("heun", 10), loss("heun", 40)
    assert 0 < coarse < 0.1 * loss("ddim", 10)
    assert fine < coarse / 100


@pytest.mark.parametrize("setting", PATHS)
def test_gradient_off_the_solution_passes_through_the_target(setting):
    """x0 = exact + theta moves G(x_t, t, s) by theta c, c = alpha_s - sigma_s alpha_t / sigma_t,
    and the clean end by std / sqrt(V_s) of that."""
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    method, ends = make(setting, solver_steps=4), []
    path = method.setting.path

    class Student(ExactJumper):
        def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            ends.append((t, self.end))
            return super().posterior_mean(x_t, t, cond)

    student = Student(path, 0.5, error=lambda t: theta)
    loss = loss_of(method, {"student": student}, 256)
    loss.backward()
    ((t, s),) = ends
    (alpha, sigma), (alpha_s, sigma_s) = path.coeffs(t), path.coeffs(s)
    gain = 0.5 / (0.25 * alpha_s**2 + sigma_s**2).sqrt() * (alpha_s - sigma_s * alpha / sigma)
    expected = float((gain**2).mean())
    assert loss.item() == pytest.approx(0.09 * expected, rel=1e-6)
    assert float(theta.grad) == pytest.approx(0.6 * expected, rel=1e-6)


def test_the_target_side_has_no_gradient():
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    method = make()
    path = method.setting.path
    target = ExactJumper(path, 0.5, error=lambda t: theta)
    nets = AnalyticNets(
        {"teacher": solver(method), "student": GaussianTeacher(path, 0.5), "target": target}
    )
    estimate, reference = method.estimate(nets, batch(std=0.5), Ctx64())
    assert not reference.requires_grad
    assert estimate.requires_grad, (
        "gradients pass through the target, whose weights the run freezes"
    )
    method.after(nets, 0)
    assert nets.ema_calls == [("target", 0.999)]


def test_guidance_is_the_teachers():
    """mu' = mu_u + g (mu_c - mu_u): the map of the guided mean alone has zero loss."""
    method = make(guidance_range=(3.0, 3.0))
    losses = []
    for scale in (3.0, 1.0):
        net = ExactJumper(FlowPath(), 0.0, scale=scale)
        nets = {"teacher": GaussianTeacher(FlowPath(), 0.0), "student": net, "target": net}
        nets["target"] = ExactJumper(FlowPath(), 0.0, scale=3.0)
        losses.append(float(loss_of(method, nets, 256)))
    # Of a point mass the target's last jump forgets where it began: compare at s = 0 alone.
    assert losses[0] < 1e-18 < losses[1]


# ------------------------------------------------------------------------------------------- times
def test_solver_steps_are_drawn_in_proportion_to_their_number():
    config = CTMConfig(solver_steps=4)
    u = (torch.arange(1000) + 0.5) / 1000
    counts = Counter(config.intervals(float(x)) for x in u)
    assert counts == {1: 100, 2: 200, 3: 300, 4: 400}
    assert (config.intervals(0.0), config.intervals(1.0 - 1e-16)) == (1, 4)
    assert {CTMConfig(solver_steps=1).intervals(x) for x in (0.0, 0.5, 0.999)} == {1}


def test_times_descend_over_the_whole_grid():
    """t > u >= s, t up to 1, s down to 0 and, sometimes, u itself; the solver walks t to u."""
    method, seen = make(solver_steps=3, num_grid=8), []

    class Student(ExactJumper):
        def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            seen.append((t, self.end))
            return super().posterior_mean(x_t, t, cond)

    teacher, path = solver(method), method.setting.path
    for seed in range(12):
        teacher.seen.clear()
        nets = {"teacher": teacher, "student": Student(path, 0.5)}
        loss_of(method, nets, 512, seed=seed)
        t, s = seen[-1]
        walked = [now for _, now in teacher.seen]
        assert torch.equal(walked[0], t)
        u = t - len(walked) / 8
        torch.testing.assert_close(walked[-1], u + 1 / 8)
        assert bool((s <= u + 1e-12).all())
        assert (float(t.max()), float(s.min())) == (1.0, 0.0)
        assert float(u.min()) == 0.0
        assert bool(((s - u).abs() < 1e-12).any() & (s < u - 0.1).any())
    assert len({len(t) for t, _ in seen}) == 1


# ---------------------------------------------------------------------------- denoising, bootstrap
@pytest.mark.parametrize(("kind", "setting"), [("flow", "flow"), ("eps", "vp"), ("x0", "ve")])
def test_denoising_term_is_that_of_its_kind_at_its_own_end(kind, setting):
    """E.g. velocity matching by hand; of x0 EDM's weight 1 / sigma^2 + 4."""
    method = make(setting, denoising=0.5)
    path, data = method.setting.path, batch(4096, std=0.5)
    student = ExactJumper(path, 0.4)
    student.kind = kind
    ctx = Ctx64(seed=2)
    found = method.denoising(AnalyticNets({"student": student}), data, ctx)
    ((x_t, t),) = student.seen
    alpha, sigma = (expand(c, x_t) for c in path.coeffs(t))
    eps = (x_t - alpha * data.x0) / sigma
    x0 = GaussianTeacher(path, 0.4).posterior_mean(x_t, t, data.cond)
    now = {"flow": (x_t - alpha * x0) / sigma - x0, "eps": (x_t - alpha * x0) / sigma, "x0": x0}
    true = {"flow": eps - data.x0, "eps": eps, "x0": data.x0}
    weight = 1.0 / sigma**2 + 4.0 if kind == "x0" else 1.0
    expected = (weight * (now[kind] - true[kind]) ** 2).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    ratio = (sigma / alpha).log().flatten()
    if setting != "vp":  # whose table ends in between
        assert float(ratio.mean()) == pytest.approx(-1.2, abs=0.02)
        assert float(ratio.std()) == pytest.approx(1.2, rel=0.03)


def test_denoising_counts_with_its_weight():
    student = ExactJumper(FlowPath(), 0.5)
    method = make(denoising=0.5)
    nets = {"teacher": solver(method), "student": student, "target": ExactJumper(FlowPath(), 0.5)}
    losses = method.student_loss(AnalyticNets(nets), batch(std=0.5), Ctx64())
    torch.testing.assert_close(
        losses.total, losses.logs["loss"] + 0.5 * losses.logs["denoising"], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("kind", ["ddim", "heun"])
def test_bootstrapped_solver_is_the_targets_own_denoiser(kind):
    """Told that it stays, an exact target solves as the exact teacher does; no teacher is held."""
    alone = make(solver=kind, denoising=1.0, bootstrap=True)
    assert "teacher" not in alone.roles()
    assert "teacher" in make(denoising=1.0, bootstrap=True, gan={"weight_g": 1.0}).roles()
    path, data = alone.setting.path, batch(std=0.5)
    net, teacher = ExactJumper(path, 0.5), GaussianTeacher(path, 0.5)
    found = alone.estimate(AnalyticNets({"student": net, "target": net}), data, Ctx64())
    nets = AnalyticNets({"teacher": teacher, "student": net, "target": net})
    expected = make(solver=kind).estimate(nets, data, Ctx64())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------------- adversarial term
def test_the_head_compares_images_with_estimates():
    """Real logits are w alpha times the images' mean; only the head gets a gradient."""
    theta, head = torch.zeros((), dtype=torch.float64, requires_grad=True), Linear()
    method = make(gan={"weight_g": 1.0, "weight_d": 0.25})
    path, data = method.setting.path, batch(8192, mean=2.0, std=0.5)
    nets = {
        "teacher": GaussianTeacher(path, 0.5),
        "student": ExactJumper(path, 0.5, error=lambda t: theta),
        "target": ExactJumper(path, 0.5),
    }
    losses = method.disc_loss(AnalyticNets(nets, {"disc": head}), data, Ctx64())
    assert float(losses.logs["logit_real"]) == pytest.approx(2.0 * 2.0 * 0.5, rel=0.05)
    torch.testing.assert_close(
        losses.logs["logit_real"], losses.logs["logit_fake"], rtol=0.05, atol=0
    )
    torch.testing.assert_close(losses.total, 0.25 * losses.logs["gan_d"], rtol=1e-6, atol=0)
    losses.total.backward()
    assert theta.grad is None
    assert head.w.grad is not None
    assert not nets["target"].seen[0][0].requires_grad


def test_adversarial_gradient_reaches_the_student_through_target_and_features():
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    method = make(gan={"weight_g": 0.5, "loss": "hinge"})
    student = ExactJumper(FlowPath(), 0.5, error=lambda t: theta)
    nets = {"teacher": solver(method), "student": student, "target": ExactJumper(FlowPath(), 0.5)}
    losses = method.student_loss(AnalyticNets(nets, {"disc": Linear()}), batch(std=0.5), Ctx64())
    torch.testing.assert_close(
        losses.total, losses.logs["loss"] + 0.5 * losses.logs["gan_g"], rtol=1e-6, atol=0
    )
    losses.total.backward()
    assert theta.grad < -1e-3  # w > 0: the head likes larger values


def test_what_it_needs_and_which_phase_reads_it():
    assert make().needs == {"cond", "x0"}
    method = make(gan={"weight_g": 1.0})
    assert method.needs == {"cond", "x0", "real"}
    disc, student = method.phases(0)
    assert (disc.trains, disc.reads_real) == (("disc",), True)
    assert (student.trains, student.reads_real) == (("student",), False)


def test_roles_are_told_the_end_where_the_student_is():
    roles = make().roles()
    assert {name: role.extra_inputs for name, role in roles.items()} == {
        "teacher": (), "student": ("s",), "target": ("s",),
    }  # fmt: skip
    plain = make(end_input=False).roles()
    assert all(role.extra_inputs == () for role in plain.values())
    assert make(cls=TSCD, end_input=True).roles()["student"].extra_inputs == ("s",)
    with pytest.warns(
        UserWarning, match=r"end_input: .*export will be refused. Set end_input: false"
    ):
        CTM(CTMConfig(end_input=True), Setting(VP, "eps"))


# ----------------------------------------------------------------------------------------- samplers
@pytest.mark.parametrize("cls", [CTM, TSCD])
@pytest.mark.parametrize("setting", SETTINGS)
def test_without_noise_every_number_of_steps_is_the_trajectory(setting, cls):
    """gamma 0, and the ode sampler: the exact map of the first noise, in 1, 2, 4 and 8 steps."""
    path, data = SETTINGS[setting][0], batch(std=0.5)
    noise = torch.randn(data.x0.shape, dtype=torch.float64)
    one, zero = torch.ones(64).double(), torch.zeros(64).double()
    expected = GaussianTeacher(path, 0.5).flow_map(noise, one, zero, data.cond)
    for options in ({"sampler": "tcd", "gamma": 0.0}, {"sampler": "ode"}):
        method = make(setting, cls, end_input=True, **options)
        for steps in (1, 2, 4, 8):
            spec = method.sampler(steps)
            assert (spec.num_steps, spec.tells_end) == (steps, True)
            x0 = sample_x0(
                ExactJumper(path, 0.5), spec, noise, data.cond, fresh_noise=lambda i: noise
            )
            torch.testing.assert_close(x0, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_gamma_keeps_the_law_of_the_data(gamma):
    """Jumps and noise travel take marginals to marginals: N(mu, std^2) at every gamma and count."""
    data, generator = batch(8192, std=0.5), torch.Generator().manual_seed(1)

    def draw(_step: int = 0) -> Tensor:
        return torch.randn(data.x0.shape, generator=generator, dtype=torch.float64)

    first = draw()
    method = make(sampler="tcd", gamma=gamma)
    for steps in (2, 4, 8):
        x0 = sample_x0(
            ExactJumper(FlowPath(), 0.5), method.sampler(steps), first, data.cond, fresh_noise=draw
        )
        assert float(x0.mean()) == pytest.approx(0.7, abs=0.01)
        assert float(x0.std()) == pytest.approx(0.5, rel=0.015)
        # What is left of the first noise: noise travel from c to t leaves r sqrt(V_c / V_t) of it.
        t = torch.tensor(method.sampler(steps).times[1:], dtype=torch.float64)
        c = (1.0 - gamma) * t
        spread = (0.25 * (1.0 - t) ** 2 + t**2).sqrt() / (0.25 * (1.0 - c) ** 2 + c**2).sqrt()
        left = float(((1.0 - t) / (1.0 - c) / spread).prod())
        found = float(torch.corrcoef(torch.stack([x0.flatten(), first.flatten()]))[0, 1])
        assert found == pytest.approx(left, abs=0.015)
        assert left < 1.0 or gamma == 0.0


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [(1, [999]), (2, [999, 499]), (4, [999, 749, 499, 249])],
)
def test_one_student_visits_trained_times_in_any_number_of_steps(num_steps, expected):
    spec = make("vp", end_input=False).sampler(num_steps)
    assert VP.model_time(torch.tensor(spec.times).double()).tolist() == expected
    assert (spec.tells_end, len(spec.trained_times)) == (False, 40)
    with pytest.raises(ValueError, match="up to 40"):
        make("vp").sampler(41)


def test_users_name_tcd_is_one_segment_sampled_with_gamma():
    config = method_config("tcd", {})
    assert (config.segments, config.sampler, config.gamma) == ((1,), "tcd", 0.3)
    stands_for = {"segments": (1,), "stage_starts": None, "sampler": "tcd"}
    assert METHODS["tscd"].aliases["tcd"] == stands_for


# ---------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "self"}, "'ema'"),
        ({"solver_steps": 41}, "solver_steps: expected at most num_grid = 40, got 41"),
        ({"num_steps": 41}, "num_steps: expected at most num_grid = 40, got 41"),
        ({"denoising": 1.0}, "expected 0 without end_input"),
        ({"denoising": 1.0, "end_input": True}, "guidance_range"),
        ({"bootstrap": True, "end_input": True}, "Set denoising"),
        ({"gan": {"source": "fake"}}, "teacher"),
        ({"gamma": 1.1}, "gamma"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CTMConfig(**options)


def test_images_are_compared_by_lpips_where_it_is_asked_for() -> None:
    setting = Setting(FlowPath(), "flow")
    assert "lpips" not in CTM(CTMConfig(lpips=None), setting).scorers()
    assert CTM(CTMConfig(lpips=LPIPSOptions(backbone="alex")), setting).scorers() == {
        "lpips": LPIPSOptions(backbone="alex").spec
    }
