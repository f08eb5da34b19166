"""Adversarial losses: values at known logits, directions, and what the optimum means."""

from __future__ import annotations

import math

import pytest
import torch

from stepdistill.losses.adversarial import (
    approximate_r1,
    discriminator_loss,
    exact_r1,
    generator_loss,
)


def test_discriminator_loss_is_two_log_two_at_logit_zero() -> None:
    zero = torch.zeros(5, 2)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert discriminator_loss(zero, zero, "hinge").item() == 2.0


def test_logit_zero_is_the_best_answer_on_identical_samples() -> None:
    logit = torch.zeros(1, requires_grad=True)
    discriminator_loss(logit, logit).backward()
    assert logit.grad is not None
    assert logit.grad.item() == 0.0
    away = torch.tensor([0.3])
    assert discriminator_loss(away, away) > discriminator_loss(logit, logit)


def test_softplus_optimum_is_the_log_density_ratio() -> None:
    """p real, q fake at one point: p softplus(-l) + q softplus(l) is least at l = log(p / q)."""
    logit = torch.tensor(math.log(3.0), requires_grad=True)
    loss = 3.0 * discriminator_loss(logit[None], torch.full((1,), -100.0))
    loss = loss + discriminator_loss(torch.full((1,), 100.0), logit[None])
    (grad,) = torch.autograd.grad(loss, logit)
    assert abs(grad.item()) < 1e-6


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_discriminator_raises_real_and_lowers_fake(kind: str) -> None:
    real, fake = torch.zeros(4, 1, requires_grad=True), torch.zeros(4, 1, requires_grad=True)
    discriminator_loss(real, fake, kind).backward()  # type: ignore[arg-type]
    slope = 0.125 if kind == "softplus" else 0.25
    assert torch.equal(real.grad, torch.full((4, 1), -slope))
    assert torch.equal(fake.grad, torch.full((4, 1), slope))


def test_hinge_ignores_samples_beyond_the_margin() -> None:
    real, fake = torch.full((2, 1), 1.5, requires_grad=True), torch.full((2, 1), -1.5)
    loss = discriminator_loss(real, fake, "hinge")
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(real.grad, torch.zeros(2, 1))


def test_generator_loss_does_not_saturate_on_a_confident_discriminator() -> None:
    fake = torch.full((1, 1), -20.0, requires_grad=True)
    loss = generator_loss(fake)
    loss.backward()
    assert loss.item() == pytest.approx(20.0)
    assert fake.grad.item() == pytest.approx(-1.0)


def test_hinge_generator_loss_is_minus_the_mean_logit() -> None:
    assert generator_loss(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "hinge").item() == -3.0


def test_clipped_hinge_pushes_no_sample_beyond_the_margin() -> None:
    fake = torch.tensor([[-1.0, 0.25, 1.0, 3.0]], requires_grad=True)
    loss = generator_loss(fake, "clipped_hinge")
    loss.backward()
    assert loss.item() == (2.0 + 0.75) / 4
    assert fake.grad.tolist() == [[-0.25, -0.25, 0.0, 0.0]]
    real = torch.tensor([[2.0, 0.5]])
    assert discriminator_loss(real, fake.detach(), "clipped_hinge") == discriminator_loss(
        real, fake.detach(), "hinge"
    )


def test_losses_compute_in_float32() -> None:
    half = torch.zeros(3, 1, dtype=torch.bfloat16)
    assert discriminator_loss(half, half).dtype == torch.float32
    assert generator_loss(half).dtype == torch.float32


def test_approximate_r1_is_the_squared_slope_times_the_noise_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    x, slope, std = torch.randn(200_000, generator=generator), 3.0, 0.1
    near = x + std * torch.randn(200_000, generator=generator)
    assert approximate_r1(slope * x, slope * near).item() == pytest.approx(0.09, rel=0.02)
    assert approximate_r1(slope * x, slope * x).item() == 0.0


def test_unknown_losses_are_errors() -> None:
    with pytest.raises(ValueError, match="got 'wgan'"):
        discriminator_loss(torch.zeros(1), torch.zeros(1), "wgan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 'wgan'"):
        generator_loss(torch.zeros(1), "wgan")  # type: ignore[arg-type]


def test_exact_r1_is_the_squared_slope_and_trains_the_slope() -> None:
    """D_k = a_k . x, K = 2: the mean of |a_k|^2, whose gradient in a_k is a_k."""
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    slopes = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 4.0]], dtype=torch.float64)
    slopes.requires_grad_()
    found = exact_r1(x @ slopes.T, x)
    found.backward()
    assert found.item() == pytest.approx((9.0 + 25.0) / 2)
    torch.testing.assert_close(slopes.grad, slopes.detach())


def test_exact_r1_of_several_inputs_lets_one_be_unread_and_of_one_does_not() -> None:
    read, unread = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    logits = 2.0 * read.sum(1, keepdim=True)
    assert exact_r1(logits, [read, unread]).item() == pytest.approx(12.0)
    with pytest.raises(RuntimeError, match="not have been used"):
        exact_r1(logits, unread)
