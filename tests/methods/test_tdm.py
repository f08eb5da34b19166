"""tdm on Gaussian teachers: one step is dmd2, the fake of a step is unbiased, its noise its own."""

from __future__ import annotations

import math

import pytest
import torch
from support.score import BSZ, PATHS, Affine, Recorder, batch_of, fake_loss, student_loss
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import NoisePath, VPPath
from stepdistill.core.types import Batch, Cond
from stepdistill.losses.score import denoising_weight
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.tdm import TDM, TDMConfig
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

STD = 0.6


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def make(path: NoisePath, kind: str = "x0", **config: object) -> TDM:
    return TDM(TDMConfig(**{"guidance": 1.0, **config}), Setting(path, kind))  # type: ignore[arg-type]


class FlowMap(AnalyticDenoiser):
    """Student whose deterministic step from one time of `times` to the next is the teacher's own
    ODE, N(0, STD^2): x / std_t is carried along."""

    def __init__(self, path: NoisePath, times: tuple[float, ...]) -> None:
        super().__init__(path)
        self.times = (*times, 0.0)

    def marginal(self, t: Tensor) -> Tensor:
        alpha, sigma = self.path.coeffs(t)
        return ((alpha * STD) ** 2 + sigma**2).sqrt()

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        k = min(range(len(self.times) - 1), key=lambda i: abs(self.times[i] - float(t[0])))
        prior = self.path.prior(torch.ones_like(t))  # its std differs from the marginal's at t = 1
        (a, s), end = self.path.coeffs(t), torch.full_like(t, self.times[k + 1])
        begin = self.marginal(t) if k else prior
        if self.times[k + 1] == 0.0:
            return x_t * (STD / begin)[:, None].to(x_t)
        a_m, s_m = self.path.coeffs(end)
        gain = self.marginal(end) / begin  # x_m = gain x_t = a_m x0 + s_m (x_t - a x0) / s
        return x_t * ((gain - s_m / s) / (a_m - s_m * a / s))[:, None].to(x_t)


# ---------------------------------------------------------------------------- one step is dmd2
@pytest.mark.parametrize("kind", ["x0", "flow"])
def test_one_step_is_dmd2_bit_for_bit(path: NoisePath, kind: str) -> None:
    found = []
    for method in (
        make(path, kind, num_steps=1),
        DMD2(DMD2Config(guidance=1.0), Setting(path, kind)),  # type: ignore[arg-type]
    ):
        student = Affine(path, torch.eye(2), torch.zeros(2))
        fake = Recorder(GaussianTeacher(path, 0.9))
        nets = AnalyticNets(
            {"student": student, "teacher": GaussianTeacher(path, STD), "fake": fake}
        )
        ctx = Ctx(phase="student")
        student_loss(method, nets, batch_of(), ctx).total.backward()  # type: ignore[arg-type]
        losses = fake_loss(method, nets, batch_of(), ctx)  # type: ignore[arg-type]
        found.append((student.weight.grad, losses.total, *fake.calls[-1][:2]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -------------------------------------------------------------------------- the fake of a step
class Slope(AnalyticDenoiser):
    """x0 = slope x_t with a slope of its own, to be fitted."""

    def __init__(self, path: NoisePath, slope: Tensor) -> None:
        super().__init__(path)
        self.slope = slope

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.slope * x_t


class Orthogonal(Ctx):
    """Draws four samples each time whose second moments are exact: rows of a Hadamard matrix."""

    draws = 0

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        self.draws += 1
        rows = [[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]
        return torch.tensor(rows[self.draws - 1], dtype=torch.float64).view(shape)


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("space", ["x0", "eps", "flow"])
def test_a_step_s_fake_is_the_teacher_where_the_student_is_the_flow_map(path, step, space) -> None:
    """The best slope at one noise level of the step is E[x0 | x_t]'s; regression on x0 gives less,
    in the first of four steps a half or so."""
    method = make(path, num_steps=4, fake_space=space)
    times = (*method.rollout.times, 0.0)
    t = 0.5 * (times[step] + times[step + 1])
    t = float(path.snap(torch.tensor([t], dtype=torch.float64)))

    class OneStep(TDM):
        def draw_times(self, ctx, bsz, t_range, within=None):  # type: ignore[no-untyped-def]
            assert within is not None
            assert within[0] <= t <= within[1]
            return torch.full((bsz,), t, dtype=torch.float64)

    method = OneStep(method.config, method.setting)
    batch = batch_of(4, 1)
    slope = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    nets = AnalyticNets(
        {"student": FlowMap(path, method.rollout.times), "fake": Slope(path, slope)}
    )
    seed = next(s for s in range(99) if Ctx(seed=s).shared_randint(0, 4) == step)
    sample = method.sample(nets, batch, Orthogonal(seed=seed))
    assert sample.start == times[step]

    def after() -> Orthogonal:
        ctx = Orthogonal()
        ctx.draws = 1
        return ctx

    def loss(at: float) -> Tensor:
        with torch.no_grad():
            slope.fill_(at)
        return method.denoising(nets, batch, after(), sample)

    low, middle, high = (float(loss(at)) for at in (-1.0, 0.0, 1.0))  # a parabola
    best = 0.5 * (low - high) / (low - 2 * middle + high)
    alpha, sigma = (float(c) for c in path.coeffs(torch.tensor([t], dtype=torch.float64)))
    wanted = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
    assert best == pytest.approx(wanted, rel=1e-3)
    if step == 0 and sample.x_m is not None:
        x_t, _, _ = method.noised(after(), sample, (0.0, 1.0))
        biased = float((x_t * sample.x0).mean() / x_t.square().mean())
        assert biased < 0.8 * wanted


def test_nobody_moves_where_the_student_is_the_flow_map(path: NoisePath) -> None:
    """Its noised states have the teacher's marginals, so the exact fake is the teacher."""
    method = make(path, num_steps=2)
    teacher = Recorder(GaussianTeacher(path, STD))
    student = FlowMap(path, method.rollout.times)
    nets = AnalyticNets({"student": student, "teacher": teacher, "fake": teacher})
    bsz = 1_000
    batch = Batch(Cond({"mean": torch.zeros(bsz, 1)}), Cond({"mean": torch.zeros(bsz, 1)}), (1,))
    for seed in range(4):
        ctx = Ctx(seed=seed)
        sample = method.sample(nets, batch, ctx)
        x_t, t, _ = method.noised(ctx, sample, method.config.dm_t_range)
        low, high = sample.end, sample.start
        assert low - 1e-6 <= float(t.min()) <= float(t.max()) <= high + 1e-6
        spread = float((x_t[:, 0] / student.marginal(t)).std())
        assert spread == pytest.approx(1.0, abs=5 / math.sqrt(2 * bsz))
        assert float(method.matching(sample, method.scores(nets, batch, ctx, sample))) == 0.0


# ------------------------------------------------------------------------------------ windows
def test_windows_are_a_step_s_own_or_reach_to_noise() -> None:
    path = PATHS["flow"]
    for windows, top in (("own", 0.25), ("to_noise", 0.98)):
        method = make(path, num_steps=4, windows=windows, trained_step="last")
        student = FlowMap(path, method.rollout.times)
        sample = method.sample(AnalyticNets({"student": student}), batch_of(), Ctx())
        _, t, _ = method.noised(Ctx(), sample, method.config.dm_t_range)
        assert len(t) == BSZ
        assert top - 0.05 < float(t.max()) <= top
        assert float(t.min()) < 0.06


def test_it_is_sampled_without_noise_between_steps() -> None:
    spec = make(PATHS["flow"], num_steps=4).sampler()
    assert spec.times == (1.0, 0.75, 0.5, 0.25)
    assert spec.kind == "ode"


def test_other_samplers_are_refused() -> None:
    with pytest.raises(ValueError, match="sampler"):
        TDMConfig(sampler="renoise")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "space"), [("x0", "native"), ("v", "native"), ("v", "eps")])
def test_a_table_of_zero_terminal_snr_has_bounded_errors(kind: str, space: str) -> None:
    """alpha is 0 at its noisy end, where x_t and its noise say nothing of x0: a step that ends
    before x0 is fitted there, too, and no noise level of it outweighs the others."""
    angle = torch.linspace(0.05, torch.pi / 2, 1000, dtype=torch.float64)
    path = VPPath(angle.cos() ** 2)
    method, times = (
        make(path, kind, num_steps=4, fake_space=space),
        torch.tensor([0.9, 0.99, 0.999, 1.0]),
    )
    batch, student = batch_of(BSZ, 3), FlowMap(path, method.rollout.times)
    seed = next(s for s in range(99) if Ctx(seed=s).shared_randint(0, 4) == 0)
    fake = GaussianTeacher(path, STD, kind)  # type: ignore[arg-type]
    nets = AnalyticNets({"student": student, "fake": fake})
    sample = method.sample(nets, batch, Ctx(seed=seed))
    errors = []
    for t in path.snap(times):
        method.draw_times = lambda *_, t=t, **__: t.expand(BSZ)  # type: ignore[method-assign]
        errors.append(float(method.denoising(nets, batch, Ctx(seed=1), sample)))
    assert all(math.isfinite(error) for error in errors)
    assert max(errors) < 10.0 * errors[0]


@pytest.mark.parametrize(
    ("name", "space"),
    [("vp", "x0"), ("vp", "eps"), ("vp", "v"), ("flow", "x0"), ("flow", "flow"), ("ve", "x0")],
)
@pytest.mark.parametrize("weight", ["none", "alpha2"])
def test_every_space_s_error_is_that_of_the_noise_of_the_step(name, space, weight) -> None:
    """share^2 |eps error|^2, x0 and x_t being those of one eps, times the fake's own weight."""
    path = PATHS[name]
    method = make(path, num_steps=2, fake_space=space, fake_weight=weight)
    nets = AnalyticNets(
        {"student": FlowMap(path, method.rollout.times), "fake": GaussianTeacher(path, 0.9)}
    )
    seed = next(s for s in range(99) if Ctx(seed=s).shared_randint(0, 2) == 0)
    sample = method.sample(nets, batch_of(BSZ, 3), Ctx(seed=seed))
    assert sample.x_m is not None
    x_t, t, noise = method.noised(Ctx(seed=seed), sample, method.config.fake_t_range)
    (_, sigma), (_, beta) = path.coeffs(t), path.travel(torch.full_like(t, sample.end), t)
    pred = nets["fake"](x_t, t, sample.cond)
    share = (beta / sigma)[:, None]
    error = (share * pred.eps - noise).square()
    own = denoising_weight(weight, path.coeffs(t))
    expected = (error if own is None else own[:, None] * error).mean()
    found = method.denoising(nets, batch_of(BSZ, 3), Ctx(seed=seed), sample)
    torch.testing.assert_close(found, expected.to(found), rtol=1e-4, atol=1e-7)
