"""dmd2 on analytic teachers: the fixed point, closed forms off it, recovery of a Gaussian."""

from __future__ import annotations

import pytest
import torch
from support.score import (
    BSZ,
    PATHS,
    VP,
    Affine,
    Gaussian,
    Leaf,
    Recorder,
    batch_of,
    fake_loss,
    fake_nets,
    make,
    student_loss,
)
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.path import FlowPath, NoisePath, VEPath, expand
from stepdistill.core.types import Cond
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


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
    t = method.draw_times(Ctx(), 20_000, (0.02, 0.98))
    assert t.min() >= 0.02
    assert t.max() <= 0.98
    u = t / (3.0 - 2.0 * t)
    low, high = 0.02 / (3 - 0.04), 0.98 / (3 - 1.96)
    assert u.mean().item() == pytest.approx((low + high) / 2, abs=0.01)
    assert u.var().item() == pytest.approx((high - low) ** 2 / 12, rel=0.03)
    assert t.mean() > 0.6


def test_times_on_a_table_are_its_entries() -> None:
    t = make(VP).draw_times(Ctx(), 500, (0.0, 1.0))
    torch.testing.assert_close(t * 1000, (t * 1000).round(), rtol=0, atol=1e-9)
    assert t.min() >= 0.001


def test_times_on_a_ve_path_stay_at_noise_levels_the_teacher_knows() -> None:
    path = VEPath(sigma_max=80.0)
    sigma = path.coeffs(make(path).draw_times(Ctx(), 20_000, (0.0, 1.0)))[1]
    assert sigma.min() >= 0.002 - 1e-9
    root = sigma ** (1 / 7)  # uniform on a Karras grid
    middle = (0.002 ** (1 / 7) + 80.0 ** (1 / 7)) / 2
    assert root.mean().item() == pytest.approx(middle, abs=0.012)


# -------------------------------------------------------------------------- Gaussian recovery
@pytest.mark.full
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


def test_needs_images_only_for_the_gan_or_data_rollouts() -> None:
    assert make(VP).needs == {"cond"}
    assert make(VP, rollout="data").needs == {"cond", "x0"}
    assert make(VP, gan={"weight_g": 1e-3}).needs == {"cond", "real"}


def test_the_head_is_a_role_only_with_the_gan() -> None:
    assert set(make(VP).roles()) == {"teacher", "student", "fake"}
    disc = make(VP, gan={"weight_g": 1e-3, "blocks": ("mid", "up")}).roles()["disc"]
    assert (disc.source, disc.train, disc.features) == ("head", True, ("mid", "up"))


def test_the_students_gradient_and_the_fakes_loss_use_their_own_ranges() -> None:
    method = make(FlowPath(), dm_t_range=(0.4, 0.5), fake_t_range=(0.8, 0.9))
    _, fake, nets = fake_nets(FlowPath())
    ctx = Ctx(phase="student")
    student_loss(method, nets, batch_of(), ctx)
    fake_loss(method, nets, batch_of(), Ctx(phase="fake", carry=ctx.carry))
    for (low, high), (_, t, _, _) in zip([(0.4, 0.5), (0.8, 0.9)], fake.calls, strict=True):
        assert low <= t.min() < t.max() <= high
