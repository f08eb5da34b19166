"""dmd2 on analytic teachers: the fixed point, closed forms off it, who is trained, rollouts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, VEPath, VPPath, expand
from stepdistill.core.solvers import sample_x0
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.methods.dmd2 import DMD2
from stepdistill.methods.dmd2_config import DMD2Config
from stepdistill.models.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

VP = VPPath.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2)
PATHS: dict[str, NoisePath] = {"vp": VP, "flow": FlowPath(), "ve": VEPath(sigma_max=10.0)}
FOUR = (1.0, 0.75, 0.5, 0.25)
BSZ = 64


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


class Gaussian(AnalyticDenoiser):
    """Exact denoiser of N(b, C) in D dimensions, b and C read afresh at every call."""

    def __init__(
        self, path: NoisePath, law: Callable[[], tuple[Tensor, Tensor]], kind: str = "x0"
    ) -> None:
        super().__init__(path, kind)  # type: ignore[arg-type]
        self.law = law

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mean, cov = (x.to(x_t) for x in self.law())
        alpha, sigma = (c.to(x_t) for c in self.path.coeffs(t))
        eye = torch.eye(len(mean)).to(x_t)
        var = alpha.view(-1, 1, 1) ** 2 * cov + sigma.view(-1, 1, 1) ** 2 * eye  # (B, D, D)
        delta = (x_t - expand(alpha, x_t) * mean).unsqueeze(-1)
        return mean + expand(alpha, x_t) * (cov @ torch.linalg.solve(var, delta)).squeeze(-1)


class Affine(AnalyticDenoiser):
    """One-step generator x0 = A z + b of unit noise z; `law` is the law of its samples."""

    def __init__(self, path: NoisePath, weight: Tensor, bias: Tensor) -> None:
        super().__init__(path)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.std = path.prior(torch.ones(1)).item()

    def law(self) -> tuple[Tensor, Tensor]:
        weight = self.weight.detach()
        return self.bias.detach(), weight @ weight.T

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return (x_t / self.std).to(self.weight.dtype) @ self.weight.T + self.bias


class Leaf(AnalyticDenoiser):
    """A student whose x0 is a parameter, so that its gradient is the gradient on x0."""

    def __init__(self, path: NoisePath, x0: Tensor) -> None:
        super().__init__(path)
        self.x0 = nn.Parameter(x0)

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.x0 + 0.0 * x_t


class Recorder(Denoiser):
    """Passes calls on and keeps what was asked."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.path, self.kind = inner, inner.path, inner.kind
        self.calls: list[tuple[Tensor, Tensor, Cond, bool]] = []

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        s: Tensor | None,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls.append((x_t.detach(), t, cond, torch.is_grad_enabled()))
        return self.inner.raw(x_t, t, cond, s, w, features)


class Net(nn.Module):
    """Weights of a small denoiser with a hidden feature, for tests of who is trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.into = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.out = nn.Parameter(0.3 * torch.randn(2, 3, generator=generator))


class NetDenoiser(Denoiser):
    """x0 = x_t + W_out tanh(W_in x_t); its one feature is the tanh."""

    def __init__(self, path: NoisePath, net: Net) -> None:
        self.path, self.kind, self.net = path, "x0", net

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        s: Tensor | None,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = torch.tanh(x_t @ self.net.into.T)
        return x_t + hidden @ self.net.out.T, dict.fromkeys(features, hidden)


class LinearHead(nn.Module):
    """(B, 3) feature -> (B, 1) logit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0]]))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features["mid"] @ self.weight.T


def make(path: NoisePath, kind: str = "x0", teacher_shift: float = 1.0, **config: object) -> DMD2:
    config = {"guidance": 1.0, **config}
    return DMD2(DMD2Config(**config), Setting(path, kind, teacher_shift))  # type: ignore[arg-type]


def batch_of(bsz: int = BSZ, dim: int = 2, x0: Tensor | None = None) -> Batch:
    rows = torch.arange(bsz, dtype=torch.float32)[:, None].expand(bsz, dim)
    return Batch(Cond({"mean": rows}), Cond({"mean": 0 * rows}), (dim,), x0)


def student_loss(method: DMD2, nets: AnalyticNets, batch: Batch, ctx: Ctx | None = None) -> Losses:
    return method.phases(0)[0].loss(nets, batch, ctx or Ctx(phase="student"))


def fake_loss(method: DMD2, nets: AnalyticNets, batch: Batch, ctx: Ctx) -> Losses:
    return method.phases(0)[1].loss(nets, batch, ctx)


MEAN, FACTOR = torch.tensor([1.0, -0.5]), torch.tensor([[0.8, 0.0], [0.5, 0.4]])


# ---------------------------------------------------------------- fixed point and closed forms
@pytest.mark.parametrize("weight", ["dmd_l1", "sigma2", "uniform"])
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_no_gradient_where_the_fake_is_the_teacher(path: NoisePath, kind: str, weight: str) -> None:
    student = Affine(path, torch.eye(2), torch.zeros(2))
    teacher = Gaussian(path, lambda: (MEAN, FACTOR @ FACTOR.T), kind)
    nets = AnalyticNets({"student": student, "teacher": teacher, "fake": teacher})
    method = make(path, kind, weight=weight, student_times=(0.4,))
    for step in range(5):
        losses = student_loss(method, nets, batch_of(), Ctx(step=step))
        losses.total.backward()
    assert torch.equal(student.weight.grad, torch.zeros(2, 2))
    assert torch.equal(student.bias.grad, torch.zeros(2))


def test_no_gradient_at_the_teachers_own_distribution(path: NoisePath) -> None:
    """A rotated square root of C generates the same law: the exact fake is then the teacher."""
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    factor = FACTOR.double()
    student = Affine(path, factor @ turn.double(), MEAN.double())
    teacher = Gaussian(path, lambda: (MEAN, factor @ factor.T))
    nets = AnalyticNets(
        {"student": student, "teacher": teacher, "fake": Gaussian(path, student.law)}
    )
    student_loss(make(path), nets, batch_of()).total.backward()
    assert student.weight.grad.abs().max() < 1e-7
    assert student.bias.grad.abs().max() < 1e-7


def leaf_setup(
    path: NoisePath, fake_mean: float, fake_std: float
) -> tuple[Leaf, Recorder, AnalyticNets, Tensor]:
    """Teacher N(row, 0.6^2) by condition; a fake with that mean plus fake_mean, its own std."""
    x0 = torch.randn(BSZ, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf, teacher = Leaf(path, x0), Recorder(GaussianTeacher(path, 0.6))

    class Shifted(GaussianTeacher):
        def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return super().posterior_mean(x_t, t, Cond({"mean": cond["mean"] + fake_mean}))

    nets = AnalyticNets({"student": leaf, "teacher": teacher, "fake": Shifted(path, fake_std)})
    return leaf, teacher, nets, x0


def test_gradient_of_a_mean_error_is_its_closed_form(path: NoisePath) -> None:
    """fake - real = sigma^2 / (alpha^2 std^2 + sigma^2) times the mean error, in every row."""
    leaf, teacher, nets, x0 = leaf_setup(path, fake_mean=0.25, fake_std=0.6)
    student_loss(make(path, weight="uniform"), nets, batch_of()).total.backward()
    t = teacher.calls[0][1]
    alpha, sigma = path.coeffs(t)
    expected = (0.25 * sigma**2 / (alpha**2 * 0.36 + sigma**2))[:, None].expand(-1, 2) / x0.numel()
    torch.testing.assert_close(leaf.x0.grad, expected, rtol=1e-7, atol=1e-12)
    assert bool((leaf.x0.grad > 0).all())  # descent lowers a mean that is too high


def test_gradient_of_a_scale_error_is_its_closed_form(path: NoisePath) -> None:
    """Too wide a student: fake - real = (k_fake - k_real)(x_t - alpha m), k = alpha std^2 / V."""
    leaf, teacher, nets, x0 = leaf_setup(path, fake_mean=0.0, fake_std=0.9)
    student_loss(make(path, weight="uniform"), nets, batch_of()).total.backward()
    x_t, t, cond, _ = teacher.calls[0]
    alpha, sigma = path.coeffs(t)

    def gain(std: float) -> Tensor:
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2)

    centred = x_t - expand(alpha, x_t) * cond["mean"]
    expected = (gain(0.9) - gain(0.6))[:, None] * centred / x0.numel()
    torch.testing.assert_close(leaf.x0.grad, expected, rtol=1e-6, atol=1e-12)
    assert bool((gain(0.9) > gain(0.6)).all())  # descent pulls samples towards the mean


def test_guidance_alone_pushes_along_cond_minus_null(path: NoisePath) -> None:
    """fake == teacher and g != 1: (1 - g)(x0_cond - x0_null), normalised by the guided mean."""
    leaf, _, _, x0 = leaf_setup(path, 0.0, 0.6)
    teacher = Recorder(GaussianTeacher(path, 0.6))
    nets = AnalyticNets({"student": leaf, "teacher": teacher, "fake": teacher.inner})
    batch = batch_of()
    student_loss(make(path, guidance=3.0), nets, batch).total.backward()
    x_t, t, _, _ = teacher.calls[0]
    x_t, t = x_t[:BSZ], t[:BSZ]  # the guided call runs cond and null as one batch
    cond, null = teacher.inner(x_t, t, batch.cond).x0, teacher.inner(x_t, t, batch.null).x0
    norm = (x0 - (null + 3.0 * (cond - null))).abs().mean(1, keepdim=True)
    expected = (1.0 - 3.0) * (cond - null) / norm / x0.numel()
    torch.testing.assert_close(leaf.x0.grad, expected, rtol=1e-6, atol=1e-12)


def test_gradient_times_stay_in_range_and_follow_the_shift() -> None:
    """On a shifted flow teacher the unshifted draw is uniform between the unshifted ends."""
    method = make(FlowPath(), "flow", 3.0)
    t = method._draw_times(Ctx(), 20_000, (0.02, 0.98))
    assert t.min() >= 0.02
    assert t.max() <= 0.98
    u = t / (3.0 - 2.0 * t)
    low, high = 0.02 / (3 - 0.04), 0.98 / (3 - 1.96)
    assert u.mean().item() == pytest.approx((low + high) / 2, abs=0.01)
    assert u.var().item() == pytest.approx((high - low) ** 2 / 12, rel=0.03)
    assert t.mean() > 0.6


def test_times_on_a_table_are_its_entries() -> None:
    t = make(VP)._draw_times(Ctx(), 500, (0.0, 1.0))
    torch.testing.assert_close(t * 1000, (t * 1000).round(), rtol=0, atol=1e-9)
    assert t.min() >= 0.001


def test_times_on_a_ve_path_stay_at_noise_levels_the_teacher_knows() -> None:
    path = VEPath(sigma_max=80.0)
    sigma = path.coeffs(make(path)._draw_times(Ctx(), 20_000, (0.0, 1.0)))[1]
    assert sigma.min() >= 0.002 - 1e-9
    root = sigma ** (1 / 7)  # uniform on a Karras grid
    middle = (0.002 ** (1 / 7) + 80.0 ** (1 / 7)) / 2
    assert root.mean().item() == pytest.approx(middle, abs=0.012)


# -------------------------------------------------------------------------- Gaussian recovery
@pytest.mark.parametrize("name", ["vp", "flow"])
@pytest.mark.parametrize("weight", ["dmd_l1", "sigma2"])
def test_a_linear_generator_recovers_the_teachers_mean_and_covariance(
    name: str, weight: str
) -> None:
    path = PATHS[name]
    cov = FACTOR @ FACTOR.T
    student = Affine(path, 0.5 * torch.eye(2), torch.zeros(2))
    nets = AnalyticNets(
        {
            "student": student,
            "teacher": Gaussian(path, lambda: (MEAN, cov)),
            "fake": Gaussian(path, student.law),
        }
    )
    method, batch = make(path, weight=weight), batch_of(256)
    optimizer = torch.optim.Adam([student.weight, student.bias], lr=0.05)
    steps = 400
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1.0 - step / steps)
        optimizer.zero_grad()
        student_loss(method, nets, batch, Ctx(step=step)).total.backward()
        optimizer.step()
    bias, learned = student.law()
    torch.testing.assert_close(bias, MEAN, rtol=0, atol=0.01)
    torch.testing.assert_close(learned, cov, rtol=0, atol=0.01)


# -------------------------------------------------------------------------- who gets gradients
def networks(path: NoisePath, method: DMD2) -> tuple[dict[str, nn.Module], AnalyticNets]:
    modules: dict[str, nn.Module] = {
        role: Net(seed) for seed, role in enumerate(("teacher", "student", "fake"))
    }
    nets = AnalyticNets(
        {role: NetDenoiser(path, net) for role, net in modules.items()},  # type: ignore[arg-type]
        {"disc": LinearHead()},
    )
    modules["disc"] = nets._heads["disc"]
    return modules, nets


def run_phase(method: DMD2, modules: dict[str, nn.Module], index: int, loss: Losses) -> set[str]:
    """Roles with a non-zero gradient; every other parameter must have none at all."""
    loss.total.backward()
    got = set()
    for role, module in modules.items():
        grads = [p.grad for p in module.parameters()]
        if role not in method.phases(0)[index].trains:
            assert all(g is None for g in grads), role
        elif all(g is not None and bool(g.abs().sum() > 0) for g in grads):
            got.add(role)
        module.zero_grad(set_to_none=True)
    return got


def train_only(modules: dict[str, nn.Module], roles: Sequence[str]) -> None:
    for role, module in modules.items():
        module.requires_grad_(role in roles)


@pytest.mark.parametrize("gan", [None, "fake", "teacher"])
def test_each_phase_trains_its_own_roles_and_all_of_them(path: NoisePath, gan: str | None) -> None:
    options = {} if gan is None else {"gan": {"weight_g": 1.0, "source": gan}}
    method = make(path, **options)
    modules, nets = networks(path, method)
    batch, ctx = batch_of(x0=torch.randn(BSZ, 2)), Ctx(phase="student")
    train_only(modules, ("student",))
    assert run_phase(method, modules, 0, student_loss(method, nets, batch, ctx)) == {"student"}
    fake_ctx = Ctx(phase="fake", carry=ctx.carry)
    trained = method.phases(0)[1].trains
    train_only(modules, trained)
    assert run_phase(method, modules, 1, fake_loss(method, nets, batch, fake_ctx)) == set(trained)
    assert set(trained) == ({"fake"} if gan is None else {"fake", "disc"})


def test_the_student_phase_spares_the_other_roles_even_unfrozen() -> None:
    """Without a GAN the gradient needs no freezing: teacher and fake ran without grad."""
    method = make(VP)
    modules, nets = networks(VP, method)
    student_loss(method, nets, batch_of()).total.backward()
    assert all(p.grad is None for r in ("teacher", "fake") for p in modules[r].parameters())


def test_gan_gradient_reaches_the_student_through_frozen_features() -> None:
    """With no distribution-matching gradient left, only the head can move the student."""
    method = make(FlowPath(), gan={"weight_g": 0.5})
    modules, nets = networks(FlowPath(), method)
    modules["fake"].load_state_dict(modules["teacher"].state_dict())
    train_only(modules, ("student",))
    losses = student_loss(method, nets, batch_of(x0=torch.randn(BSZ, 2)))
    assert losses.logs["dm"].item() == 0.0
    assert losses.total.item() == pytest.approx(0.5 * losses.logs["gan_g"].item())
    assert run_phase(method, modules, 0, losses) == {"student"}


@pytest.mark.parametrize("source", ["fake", "teacher"])
def test_the_critics_denoiser_learns_from_the_head_only_as_its_source(source: str) -> None:
    method = make(FlowPath(), gan={"weight_g": 1.0, "source": source, "weight_d": 1.0})
    without = make(FlowPath(), order="exclusive")
    grads = []
    for one in (method, without):
        modules, nets = networks(FlowPath(), one)
        train_only(modules, ("fake", "disc"))
        ctx = Ctx(phase="fake", repeat=1)
        fake_loss(one, nets, batch_of(x0=torch.randn(BSZ, 2)), ctx).total.backward()
        grads.append(modules["fake"].into.grad)
    assert torch.equal(*grads) == (source == "teacher")


def test_identical_real_and_fake_samples_give_two_log_two_at_logit_zero() -> None:
    method = make(VP, gan={"weight_g": 1.0, "same_noise": True, "r1_weight": 100.0})
    modules, nets = networks(VP, method)
    x0 = torch.randn(BSZ, 2)
    ctx = Ctx(carry={"sample": (x0, batch_of().cond)})
    logs = fake_loss(method, nets, batch_of(x0=x0), ctx).logs
    assert logs["logit_real"] == logs["logit_fake"]
    assert logs["r1"] > 0.0
    modules["disc"].weight.data.zero_()
    losses = fake_loss(method, nets, batch_of(x0=x0), Ctx(carry=ctx.carry))
    assert losses.logs["gan_d"].item() == pytest.approx(2 * 0.6931472)
    assert losses.total.item() == pytest.approx(losses.logs["fake"].item() + 0.01 * 2 * 0.6931472)


def test_real_and_fake_samples_get_noise_of_their_own_unless_told() -> None:
    method = make(VP, gan={"weight_g": 1.0})
    _, nets = networks(VP, method)
    x0 = torch.randn(BSZ, 2)
    ctx = Ctx(carry={"sample": (x0, batch_of().cond)})
    logs = fake_loss(method, nets, batch_of(x0=x0), ctx).logs
    assert logs["logit_real"] != logs["logit_fake"]


def test_r1_weight_counts_inside_the_discriminator_weight() -> None:
    totals = []
    for weight in (0.0, 50.0):
        method = make(VP, gan={"weight_g": 1.0, "weight_d": 0.5, "r1_weight": weight})
        _, nets = networks(VP, method)
        ctx = Ctx(carry={"sample": (torch.zeros(BSZ, 2), batch_of().cond)})
        totals.append(fake_loss(method, nets, batch_of(x0=torch.ones(BSZ, 2)), ctx))
    gap = totals[1].total - totals[0].total
    assert gap.item() == pytest.approx(0.5 * 50.0 * totals[1].logs["r1"].item(), rel=1e-3)


# ------------------------------------------------------------------------------- update order
def fake_nets(path: NoisePath) -> tuple[Recorder, Recorder, AnalyticNets]:
    student = Recorder(Affine(path, torch.eye(2), torch.zeros(2)))
    fake = Recorder(GaussianTeacher(path, 0.6))
    teacher = GaussianTeacher(path, 0.6)
    return student, fake, AnalyticNets({"student": student, "teacher": teacher, "fake": fake})


@pytest.mark.parametrize("order", ["critic_always", "exclusive"])
def test_both_orders_make_critic_steps_fake_updates_per_student_update(order: str) -> None:
    phases = make(VP, order=order, critic_steps=7).phases(0)
    assert [(p.name, p.repeat) for p in phases] == [("student", 1), ("fake", 7)]


def test_critic_always_reuses_the_students_sample_with_its_own_condition() -> None:
    method = make(FlowPath())
    student, fake, nets = fake_nets(FlowPath())
    ctx, first = Ctx(phase="student"), batch_of()
    student_loss(method, nets, first, ctx)
    x0, _ = ctx.carry["sample"]  # type: ignore[misc]
    assert not x0.requires_grad
    calls = len(student.calls)
    later = Batch(Cond({"mean": first.cond["mean"] + 100.0}), first.null, (2,))
    fake_ctx = Ctx(phase="fake", carry=ctx.carry)
    fake_loss(method, nets, later, fake_ctx)
    x_t, t, seen, _ = fake.calls[-1]
    assert len(student.calls) == calls  # no new sample
    assert torch.equal(seen["mean"], first.cond["mean"])
    noise = (x_t - expand(1.0 - t, x_t) * x0) / expand(t, x_t)
    replay = Ctx(phase="fake")
    replay.rand(BSZ)
    torch.testing.assert_close(noise, replay.randn((BSZ, 2)), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("order", "repeat"), [("critic_always", 1), ("exclusive", 0)])
def test_other_fake_updates_draw_a_new_sample_without_graph(order: str, repeat: int) -> None:
    method = make(FlowPath(), order=order)
    student, fake, nets = fake_nets(FlowPath())
    ctx = Ctx(phase="student")
    student_loss(method, nets, batch_of(), ctx)
    later = Batch(Cond({"mean": batch_of().cond["mean"] + 100.0}), batch_of().null, (2,))
    fake_loss(method, nets, later, Ctx(phase="fake", repeat=repeat, carry=ctx.carry))
    assert len(student.calls) == 2
    assert not student.calls[1][3]
    assert not torch.equal(student.calls[0][0], student.calls[1][0])
    assert torch.equal(fake.calls[-1][2]["mean"], later.cond["mean"])


def test_the_fake_is_never_guided() -> None:
    method = make(FlowPath(), guidance=8.0)
    _, fake, nets = fake_nets(FlowPath())
    ctx = Ctx(phase="student")
    student_loss(method, nets, batch_of(), ctx)
    fake_loss(method, nets, batch_of(), Ctx(phase="fake", carry=ctx.carry))
    assert [call[0].shape[0] for call in fake.calls] == [BSZ, BSZ]  # no doubled batch


# ------------------------------------------------------------------------------------ rollout
def ctx_at_step(k: int, steps: int = 4, **more: object) -> Ctx:
    """A Ctx whose first shared draw is step k."""
    for step in range(1000):
        if Ctx(step=step, **more).shared_randint(0, steps) == k:  # type: ignore[arg-type]
            return Ctx(step=step, **more)  # type: ignore[arg-type]
    raise AssertionError("no such step")


@pytest.mark.parametrize("rollout", ["simulate", "data"])
def test_the_first_step_starts_from_pure_noise(path: NoisePath, rollout: str) -> None:
    method = make(path, rollout=rollout, num_steps=4)
    student, _, nets = fake_nets(path)
    batch = batch_of(x0=torch.full((BSZ, 2), 50.0))
    ctx = ctx_at_step(0)
    method.rollout(nets, batch, ctx)
    replay = Ctx(step=ctx.step).randn((BSZ, 2))
    assert len(student.calls) == 1
    assert torch.equal(student.calls[0][0], path.prior(replay))
    assert torch.equal(student.calls[0][1], torch.ones(BSZ, dtype=torch.float64))


def test_simulation_runs_the_earlier_steps_without_gradients(path: NoisePath) -> None:
    method = make(path, num_steps=4)
    student, _, nets = fake_nets(path)
    method.rollout(nets, batch_of(), ctx_at_step(2))
    assert [call[1][0].item() for call in student.calls] == pytest.approx([1.0, 0.75, 0.5])
    assert [call[3] for call in student.calls] == [False, False, True]


@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_simulation_is_the_sampler_of_the_same_grid(path: NoisePath, sampler: str) -> None:
    """The last step of a simulated rollout is what the exported student will output."""
    method = make(path, num_steps=4, sampler=sampler)
    student, _, nets = fake_nets(path)
    ctx = ctx_at_step(3)
    got = method.rollout(nets, batch_of(), ctx)
    replay = Ctx(step=ctx.step)
    noise = replay.randn((BSZ, 2))
    spec = method.sampler()
    assert spec.kind == sampler
    expected = sample_x0(
        student.inner, spec, noise, batch_of().cond, fresh_noise=lambda i: replay.randn((BSZ, 2))
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_deterministic_rollout_draws_no_noise_on_the_way() -> None:
    method = make(FlowPath(), num_steps=4, sampler="ode")
    student, _, nets = fake_nets(FlowPath())
    ctx = ctx_at_step(1)
    method.rollout(nets, batch_of(), ctx)
    (x1, _, _, _), (x2, _, _, _) = student.calls
    # Affine with A = I, b = 0 answers x0 = x_t, so flow = 0 and the Euler step stays put.
    torch.testing.assert_close(x1, x2)


def test_simulated_samples_do_not_depend_on_the_datasets_latents() -> None:
    method = make(VP, num_steps=4)
    outs = []
    for value in (0.0, 7.0):
        _, _, nets = fake_nets(VP)
        x0 = torch.full((BSZ, 2), value)
        outs.append(method.rollout(nets, batch_of(x0=x0), ctx_at_step(3)))
    assert torch.equal(*outs)


def test_data_rollout_feeds_noised_real_latents() -> None:
    method = make(FlowPath(), num_steps=4, rollout="data")
    student, _, nets = fake_nets(FlowPath())
    method.rollout(nets, batch_of(512, x0=torch.full((512, 2), 8.0)), ctx_at_step(3))
    assert len(student.calls) == 1
    x_t, t, _, _ = student.calls[0]
    assert t[0].item() == 0.25
    assert x_t.mean().item() == pytest.approx(0.75 * 8.0, abs=0.03)
    assert x_t.std().item() == pytest.approx(0.25, rel=0.1)


def test_every_rank_takes_the_same_step_on_other_noise() -> None:
    method, seen = make(FlowPath(), num_steps=4), []
    for step in range(12):
        inputs = []
        for rank in (0, 1):
            student, _, nets = fake_nets(FlowPath())
            method.rollout(nets, batch_of(8), Ctx(step=step, rank=rank, world_size=2))
            inputs.append((len(student.calls), student.calls[0][0]))
        assert inputs[0][0] == inputs[1][0]
        assert not torch.equal(inputs[0][1], inputs[1][1])
        seen.append(inputs[0][0])
    assert set(seen) == {1, 2, 3, 4}


def test_two_ranks_draw_what_one_process_with_both_batches_draws() -> None:
    method = make(FlowPath(), num_steps=2)
    _, _, nets = fake_nets(FlowPath())
    whole = method.rollout(nets, batch_of(8), Ctx(step=3))
    halves = [
        method.rollout(nets, batch_of(4), Ctx(step=3, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    assert torch.equal(whole, torch.cat(halves))


# --------------------------------------------------------------------------- grids and sampler
def test_one_step_students_may_be_conditioned_on_an_earlier_time() -> None:
    """DMD2's one-step SDXL: pure noise in, conditioning index 399."""
    method = make(VP, "eps", student_times=(0.4,))
    student, _, nets = fake_nets(VP)
    method.rollout(nets, batch_of(), Ctx())
    x, t, _, _ = student.calls[0]
    assert VP.model_time(t)[0].item() == 399.0
    assert torch.equal(x, Ctx().randn((BSZ, 2)))
    assert method.sampler(1).times == (0.4,)


def test_four_steps_on_a_table_are_the_releases_indices() -> None:
    spec = make(VP, num_steps=4).sampler()
    indices = VP.model_time(torch.tensor(spec.times, dtype=torch.float64))
    assert indices.tolist() == [999.0, 749.0, 499.0, 249.0]
    assert (spec.kind, spec.guidance, spec.trained_times) == ("renoise", 1.0, FOUR)


def test_flow_grid_follows_the_teachers_shift_or_the_configs() -> None:
    assert make(FlowPath(), "flow", 5.0, num_steps=4).sampler().times == pytest.approx(
        (1.0, 0.9375, 5 / 6, 0.625)
    )
    assert make(FlowPath(), "flow", 5.0, num_steps=4, shift=1.0).sampler().times == FOUR


def test_fewer_steps_must_lie_on_the_trained_grid() -> None:
    method = make(VP, num_steps=4)
    assert method.sampler(2).times == (1.0, 0.5)
    with pytest.raises(ValueError, match="expected times from the trained grid"):
        method.sampler(3)


def test_grids_that_do_not_divide_the_table_are_moved_onto_it() -> None:
    assert make(VP, num_steps=3).sampler().times == pytest.approx((1.0, 0.667, 0.333))
    assert make(VP, num_steps=6).sampler(3).num_steps == 3


def test_needs_images_only_for_the_gan_or_data_rollouts() -> None:
    assert make(VP).needs == {"cond"}
    assert make(VP, rollout="data").needs == {"cond", "x0"}
    assert make(VP, gan={"weight_g": 1e-3}).needs == {"cond", "x0"}


def test_the_head_is_a_role_only_with_the_gan() -> None:
    assert set(make(VP).roles()) == {"teacher", "student", "fake"}
    disc = make(VP, gan={"weight_g": 1e-3, "blocks": ("mid", "up")}).roles()["disc"]
    assert (disc.source, disc.train, disc.features) == ("head", True, ("mid", "up"))


# ------------------------------------------------------------------------------ bad settings
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rollout": "pure_noise", "num_steps": 4}, "got pure_noise"),
        ({"student_times": (0.5, 1.0)}, "expected descending times"),
        ({"student_times": ()}, "expected descending times"),
        ({"student_times": (1.2, 0.5)}, r"in \(0, 1\]"),
        ({"student_times": (1.0, 0.3333)}, "The nearest are"),
        ({"dm_t_range": (0.9, 0.1)}, "expected 0 <= low < high <= 1"),
        ({"critic_steps": 0}, "greater than or equal to 1"),
        ({"gan": {"weight": 1.0}}, "Extra inputs"),
    ],
)
def test_bad_settings_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(VP, **config)


def test_student_times_win_over_num_steps_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="num_steps 2 has no effect"):
        method = make(VP, num_steps=2, student_times=FOUR)
    assert method.sampler().times == FOUR


def test_eps_students_at_high_noise_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"by 14\.6 in x0"):
        make(VP, "eps")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(VP, "v")
        make(VP, "eps", student_times=(0.4,))
        make(FlowPath(), "flow")
