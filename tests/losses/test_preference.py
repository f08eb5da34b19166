"""Margins on Gaussian policies, by torch.distributions; signs, ties and the hinge."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from stepdistill.losses.preference import (
    hinge,
    log_ratio,
    logistic,
    online,
    pair_errors,
    preference_gap,
)

BSZ, SHAPE, SIGMA, BETA = 5, (2, 3, 4), 0.7, 3.0
NUM = math.prod(SHAPE)


def draw(seed: int, bsz: int = 2 * BSZ) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(bsz, *SHAPE, generator=generator, dtype=torch.float64)


def errors(mean: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    return pair_errors(mean, x0, torch.full((len(x0),), SIGMA**-2, dtype=torch.float64))


def log_ratios(mean: Tensor, reference: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    """log p / p_ref of chosen and rejected images (B,), summed over dimensions, in nats."""
    one, other = (Normal(m, SIGMA).log_prob(x0).flatten(1).sum(1) for m in (mean, reference))
    chosen, rejected = (one - other).chunk(2)
    return chosen, rejected


@pytest.mark.parametrize("k", [1.0, 0.1])
def test_the_margin_is_the_log_odds_of_gaussian_policies(k) -> None:
    x0, mean, reference = draw(0), draw(1), draw(2)
    gaps = [preference_gap(errors(m, x0), k) for m in (mean, reference)]
    losses, margin, _ = logistic(*gaps, BETA)
    chosen, rejected = log_ratios(mean, reference, x0)
    expected = BETA * 2 / NUM * (chosen - k * rejected)
    torch.testing.assert_close(margin, expected)
    torch.testing.assert_close(losses, torch.log1p((-expected).exp()))


def test_a_swapped_pair_flips_the_sign() -> None:
    x0, mean, reference = draw(0), draw(1), draw(2)
    margins = []
    for shift in (0, BSZ):
        seen = [one.roll(shift, 0) for one in (x0, mean, reference)]
        gaps = [preference_gap(errors(m, seen[0]), 1.0) for m in seen[1:]]
        margins.append(logistic(*gaps, BETA)[1])
    torch.testing.assert_close(margins[0], -margins[1])
    assert float(margins[0].abs().min()) > 0.01


def test_the_reference_itself_has_ln_2_and_a_slope() -> None:
    x0, mean = draw(0), draw(1).requires_grad_()
    gap = preference_gap(errors(mean, x0), 0.1)
    losses, margin, flat = logistic(gap, gap.detach(), BETA)
    assert torch.equal(losses, torch.full_like(losses, math.log(2.0)))
    assert not margin.any()
    assert not flat.any()
    losses.mean().backward()
    assert mean.grad is not None
    assert float(mean.grad.abs().max()) > 0


def test_a_tie_has_no_gradient() -> None:
    half = draw(0, BSZ)
    mean = draw(1, BSZ).requires_grad_()
    gap = preference_gap(errors(torch.cat([mean, mean]), torch.cat([half, half])), 1.0)
    losses, _, _ = logistic(gap, torch.zeros_like(gap), BETA)
    losses.sum().backward()
    assert mean.grad is not None
    assert not mean.grad.any()


def test_a_step_down_raises_the_chosen_s_odds() -> None:
    x0, reference = draw(0), draw(1)
    mean = reference.clone().requires_grad_()
    fixed = preference_gap(errors(reference, x0), 1.0)
    logistic(preference_gap(errors(mean, x0), 1.0), fixed, BETA)[0].sum().backward()
    assert mean.grad is not None
    chosen, rejected = log_ratios((mean - mean.grad).detach(), reference, x0)
    assert bool((chosen - rejected > 0).all())


def test_pairs_far_apart_are_flat() -> None:
    gaps = torch.tensor([-2.0, -1.5, 0.0, 1.5])
    losses, margin, flat = logistic(gaps, torch.zeros(4), BETA)
    assert flat.tolist() == [True, False, False, False]  # sigmoid(-6) < .01 < sigmoid(-4.5)
    torch.testing.assert_close(margin, -BETA * gaps)
    assert bool((losses.diff() > 0).all())


def test_the_hinge_by_hand() -> None:
    chosen, rejected = torch.tensor([1.0, 0.1]), torch.tensor([2.0, 9.0])
    gap = preference_gap((chosen, rejected), 0.1)
    torch.testing.assert_close(gap, torch.tensor([0.8, -0.8]))
    losses, margin, flat = hinge((chosen, rejected), gap, 5.0, 0.5)
    torch.testing.assert_close(losses, torch.tensor([1 + 5 * 0.8 + 1.0, 0.0 + 4.5]))
    torch.testing.assert_close(margin, torch.tensor([-4.0, 4.0]))
    assert flat.tolist() == [False, True]


def test_a_step_s_log_ratio_is_that_of_two_gaussians() -> None:
    later, mean, reference = draw(0), draw(1), draw(2)
    laws = [Normal(m, SIGMA).log_prob(later).flatten(1).mean(1) for m in (mean, reference)]
    found = log_ratio(later, mean, reference, torch.tensor(SIGMA, dtype=torch.float64))
    torch.testing.assert_close(found, laws[0] - laws[1])


def test_online_pairs_cost_by_who_won_and_by_clamped_ratios() -> None:
    """The first won, the second did, nobody; ratios within and beyond the clamp, and on it."""
    clip = 0.2
    low, high = math.log1p(-clip), math.log1p(clip)
    one, other = [0.1, 0.05, 0.1, 9.0, high, low], [0.02, 0.15, -0.1, -9.0, -0.1, 0.1]
    won = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    ratio = torch.tensor(one + other, dtype=torch.float64)
    losses, margin, clamped = online(ratio, won, BETA, clip)
    gaps = [0.08, -0.1, 0.2, high - low, high + 0.1, low - 0.1]
    expected = BETA * won * torch.tensor(gaps, dtype=torch.float64)
    torch.testing.assert_close(margin, expected)
    torch.testing.assert_close(losses, torch.log1p((-expected).exp()) * won.abs())
    assert clamped.tolist() == [False] * 3 + [True, False, False] + [False] * 3 + [
        True,
        False,
        False,
    ]


def test_a_hinge_is_flat_beyond_its_margin_alone() -> None:
    gap = torch.tensor([-0.49, -0.5, -0.51], dtype=torch.float64)
    errors_of = (gap + 0.3, torch.full_like(gap, 0.3))
    losses, margin, flat = hinge(errors_of, gap, 2.0, 0.0)
    assert margin.tolist() == pytest.approx([0.98, 1.0, 1.02])
    assert losses.tolist() == pytest.approx([0.02, 0.0, 0.0])
    assert flat.tolist() == [False, False, True]
