"""Score losses: closed forms, exact zeros, and independence of the prediction type."""

from __future__ import annotations

import pytest
import torch

from stepdistill.core.path import FlowPath, NoisePath, VEPath, VPPath
from stepdistill.core.types import Cond
from stepdistill.losses.score import (
    denoising_loss,
    denoising_weight,
    dmd_gradient,
    score_identity,
    surrogate,
)
from stepdistill.testing.analytic import GaussianTeacher

VP = VPPath.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2)
PATHS: dict[str, NoisePath] = {"vp": VP, "flow": FlowPath(), "ve": VEPath(sigma_max=10.0)}
WEIGHTS = ("dmd_l1", "sigma2", "uniform")
SHAPE = (4, 2, 3, 3)


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def times(bsz: int = 4) -> torch.Tensor:
    # from 0.3: at VE sigma(0.1) = 1e-6, eps = (x_t - x0) / sigma has lost its digits
    return torch.linspace(0.3, 0.9, bsz, dtype=torch.float64)


@pytest.mark.parametrize("weight", WEIGHTS)
def test_gradient_is_exactly_zero_where_fake_is_real(weight: str, path: NoisePath) -> None:
    real = draw(1)
    grad = dmd_gradient(draw(0), real, real.clone(), weight, path.coeffs(times()))
    assert torch.equal(grad, torch.zeros_like(grad))


def test_l1_gradient_is_the_difference_over_each_samples_own_distance() -> None:
    x0, real, fake = draw(0), draw(1), draw(2)
    grad = dmd_gradient(x0, real, fake)
    for i in range(4):
        expected = (fake[i] - real[i]) / (x0[i] - real[i]).abs().mean()
        torch.testing.assert_close(grad[i], expected, rtol=1e-12, atol=0)


def test_l1_gradient_does_not_change_with_the_scale_of_the_latents() -> None:
    x0, real, fake = draw(0), draw(1), draw(2)
    torch.testing.assert_close(
        dmd_gradient(x0, real, fake), dmd_gradient(7 * x0, 7 * real, 7 * fake), rtol=1e-12, atol=0
    )


def test_l1_normaliser_is_clamped_where_the_sample_sits_on_the_real_mean() -> None:
    x0 = draw(0)
    grad = dmd_gradient(x0, x0, x0 + 1e-9)
    torch.testing.assert_close(grad, (x0 + 1e-9 - x0) / 1e-6)


def test_sigma2_weight_is_vsds_difference_of_noise_predictions(path: NoisePath) -> None:
    x_t, real, fake, t = draw(0), draw(1), draw(2), times()
    eps_real = path.convert(real, x_t, t, "x0", "eps")
    eps_fake = path.convert(fake, x_t, t, "x0", "eps")
    sigma = path.coeffs(t)[1].view(-1, 1, 1, 1)
    grad = dmd_gradient(x_t, real, fake, "sigma2", path.coeffs(t))
    torch.testing.assert_close(grad, sigma**2 * (eps_real - eps_fake), rtol=1e-9, atol=1e-12)


def test_gradient_points_from_the_real_mean_to_the_fake_one() -> None:
    """Descent on x0 moves a sample whose distribution lies too high downwards."""
    grad = dmd_gradient(torch.full((1, 3), 2.0), torch.zeros(1, 3), torch.ones(1, 3), "uniform")
    assert torch.equal(grad, torch.ones(1, 3))


def test_gradient_computes_in_float32_without_graph() -> None:
    half = [draw(i).half().requires_grad_() for i in range(3)]
    grad = dmd_gradient(*half)
    assert grad.dtype == torch.float32
    assert not grad.requires_grad


def test_sigma2_without_coefficients_and_unknown_weights_are_errors() -> None:
    with pytest.raises(ValueError, match="expected coeffs with weight 'sigma2'"):
        dmd_gradient(draw(0), draw(1), draw(2), "sigma2")
    with pytest.raises(ValueError, match="got 'l2'"):
        dmd_gradient(draw(0), draw(1), draw(2), "l2")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_prediction_type_of_a_denoiser_gives_one_gradient(
    kind: str, weight: str, path: NoisePath
) -> None:
    x0, t, cond = draw(0), times(), Cond({"mean": draw(3)})
    x_t = path.add_noise(x0, draw(1), t)

    def gradient(kind: str) -> torch.Tensor:
        real = GaussianTeacher(path, 0.7, kind)(x_t, t, cond).x0  # type: ignore[arg-type]
        fake = GaussianTeacher(path, 0.4, kind)(x_t, t, cond).x0  # type: ignore[arg-type]
        return dmd_gradient(x0, real, fake, weight, path.coeffs(t))  # type: ignore[arg-type]

    torch.testing.assert_close(gradient(kind), gradient("x0"), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_surrogate_gradient_is_exactly_grad_over_numel(scale: float) -> None:
    x, grad = draw(0).float().requires_grad_(), scale * draw(1).float()
    loss = surrogate(x, grad)
    (got,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(got, grad / x.numel(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss.detach(), 0.5 * grad.square().mean())


def test_surrogate_passes_no_gradient_to_the_wanted_gradient() -> None:
    x, grad = draw(0).requires_grad_(), draw(1).requires_grad_()
    surrogate(x, grad).backward()
    assert grad.grad is None


@pytest.mark.parametrize("space", ["native", "x0", "eps", "v", "flow"])
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_denoising_loss_vanishes_for_a_denoiser_that_knows_x0(
    space: str, kind: str, path: NoisePath
) -> None:
    x0, eps, t = draw(0), draw(1), times()
    oracle = GaussianTeacher(path, 0.0, kind)  # type: ignore[arg-type]
    pred = oracle(path.add_noise(x0, eps, t), t, Cond({"mean": x0}))
    assert denoising_loss(pred, x0, eps, space).item() < 1e-20  # type: ignore[arg-type]


def test_denoising_losses_of_two_spaces_differ_by_the_noise_to_signal_ratio(
    path: NoisePath,
) -> None:
    """x0 error = -(sigma / alpha) eps error = -sigma v error (VP) = -(sigma/(alpha+sigma)) flow."""
    x0, eps = draw(0), draw(1)
    t = torch.full((4,), 0.6, dtype=torch.float64)
    alpha, sigma = (c[0].item() for c in path.coeffs(t))
    pred = GaussianTeacher(path, 0.5, "eps")(path.add_noise(x0, eps, t), t, Cond({"mean": draw(2)}))
    in_x0 = denoising_loss(pred, x0, eps, "x0").item()
    in_eps = denoising_loss(pred, x0, eps, "eps").item()
    in_flow = denoising_loss(pred, x0, eps, "flow").item()
    in_v = denoising_loss(pred, x0, eps, "v").item()
    assert in_x0 == pytest.approx((sigma / alpha) ** 2 * in_eps, rel=1e-9)
    assert in_x0 == pytest.approx((sigma / (alpha + sigma)) ** 2 * in_flow, rel=1e-9)
    assert in_x0 == pytest.approx((sigma / (alpha**2 + sigma**2)) ** 2 * in_v, rel=1e-9)


def test_denoising_weight_counts_per_sample() -> None:
    path, x0, eps, t = PATHS["vp"], draw(0), draw(1), times()
    pred = GaussianTeacher(path, 0.5, "eps")(path.add_noise(x0, eps, t), t, Cond({"mean": draw(2)}))
    alpha2 = path.coeffs(t)[0] ** 2
    per_sample = (pred.eps - eps).square().mean(dim=(1, 2, 3))
    expected = (alpha2 * per_sample).mean()
    torch.testing.assert_close(denoising_loss(pred, x0, eps, "eps", alpha2), expected)


def test_native_flow_loss_is_finite_at_time_zero() -> None:
    path, x0, eps = FlowPath(), draw(0), draw(1)
    t = torch.zeros(4, dtype=torch.float64)

    class Still(GaussianTeacher):
        def raw(self, x_t, t, cond, w, features):  # type: ignore[no-untyped-def]
            return torch.zeros_like(x_t), {}

    pred = Still(path, 1.0, "flow")(path.add_noise(x0, eps, t), t, Cond({"mean": x0}))
    torch.testing.assert_close(denoising_loss(pred, x0, eps), (eps - x0).square().mean())


def test_weights_of_the_denoising_error() -> None:
    alpha, sigma = torch.tensor([0.6, 1.0]).double(), torch.tensor([0.8, 2.0]).double()
    assert denoising_weight("none", (alpha, sigma)) is None
    squared = denoising_weight("alpha2", (alpha, sigma))
    assert squared is not None
    assert squared.tolist() == pytest.approx([0.36, 1.0])
    edm = denoising_weight("edm", (alpha, sigma), sigma_data=0.4)
    assert edm is not None
    assert edm.tolist() == pytest.approx([0.5625 + 6.25, 0.25 + 6.25])


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_score_identity_is_its_formula_of_each_sample(alpha: float) -> None:
    x0, real, fake = draw(0), draw(1), draw(2)
    fake[1] = real[1]  # nothing to learn from
    real[2] = x0[2] + 1e-9  # its distance is below the floor of the denominator
    made = score_identity(x0, real, fake, alpha)
    for i in range(len(x0)):
        gap = real[i] - fake[i]
        norm = max(1e-5, float((x0[i] - real[i]).abs().mean()))
        wanted = float((gap * (real[i] - x0[i] - alpha * gap)).mean()) / norm
        assert float(made[i]) == pytest.approx(wanted, rel=1e-9)
    assert float(made[1]) == 0.0
