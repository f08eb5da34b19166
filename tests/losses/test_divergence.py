"""f-divergence weights: against f'', against the divergence's own derivative, and the bins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stepdistill.losses.divergence import (
    bin_stats,
    density_ratio,
    divergence_weight,
    time_bin,
    update_bins,
)

F: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": lambda r: -r.log(),
    "kl": lambda r: r * r.log(),
    "js": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "sf": lambda r: (r + 1) * ((r + 1) / (2 * r)).log(),
    "sh": lambda r: 1 - r.sqrt(),
    "neyman": lambda r: (1 - r) ** 2 / r,
    "jf": lambda r: (r - 1) * r.log(),
}
RATIO = torch.logspace(-2, 2, 9, dtype=torch.float64)


@pytest.mark.parametrize("name", list(F))
def test_weight_is_r_squared_times_the_second_derivative(name: str) -> None:
    r = RATIO.clone().requires_grad_()
    (first,) = torch.autograd.grad(F[name](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    h = divergence_weight(RATIO, name)  # type: ignore[arg-type]
    torch.testing.assert_close(h, RATIO**2 * second, rtol=1e-9, atol=0)
    assert bool((h > 0).all())


# D_f between Gaussians on a line, by quadrature: p = N(0.3, 0.8^2), q = N(mean, std^2).
X = torch.linspace(-5, 6, 11_001, dtype=torch.float64)


def log_normal(mean: float, std: float) -> Tensor:
    law = torch.tensor([mean, std], dtype=torch.float64)  # float32 would round the step away
    return torch.distributions.Normal(*law).log_prob(X)


def divergence(name: str, mean: float, std: float) -> float:
    log_p, log_q = log_normal(0.3, 0.8), log_normal(mean, std)
    return float(torch.trapezoid(log_q.exp() * F[name]((log_p - log_q).exp()), X))


@pytest.mark.parametrize("name", list(F))
@pytest.mark.parametrize("which", ["mean", "std"])
def test_weighted_score_difference_is_the_divergences_derivative(name: str, which: str) -> None:
    """-E_q[h(r) (score_p - score_q) dx/dtheta] for x = mean + std z: central differences."""
    mean, std, step = 0.55, 0.7, 1e-4
    log_p, log_q = log_normal(0.3, 0.8), log_normal(mean, std)
    h = divergence_weight((log_p - log_q).exp(), name)  # type: ignore[arg-type]
    scores = -(X - 0.3) / 0.8**2 + (X - mean) / std**2
    moves = torch.ones_like(X) if which == "mean" else (X - mean) / std
    ours = -torch.trapezoid(log_q.exp() * h * scores * moves, X)
    up = (mean + step, std) if which == "mean" else (mean, std + step)
    down = (mean - step, std) if which == "mean" else (mean, std - step)
    expected = (divergence(name, *up) - divergence(name, *down)) / (2 * step)
    assert ours.item() == pytest.approx(expected, rel=1e-5)


def test_js_and_sf_sum_to_one_and_jeffreys_is_both_kls() -> None:
    h = {name: divergence_weight(RATIO, name) for name in F}  # type: ignore[arg-type]
    torch.testing.assert_close(h["js"] + h["sf"], torch.ones_like(RATIO), rtol=1e-12, atol=0)
    torch.testing.assert_close(h["jf"], h["kl"] + h["rkl"], rtol=1e-12, atol=0)


def test_an_unknown_divergence_is_named() -> None:
    with pytest.raises(ValueError, match="'tv'"):
        divergence_weight(RATIO, "tv")  # type: ignore[arg-type]


def test_ratio_is_exp_of_the_mean_logit_within_its_bounds() -> None:
    logits = torch.tensor([[0.5, 1.5], [-40.0, -40.0], [1e6, 0.0]], requires_grad=True)
    ratio = density_ratio(logits, (0.1, 20.0))
    torch.testing.assert_close(
        ratio, torch.tensor([1.0, 0.0, 0.0]).exp() * ratio.new_tensor([1.0, 0.1, 20.0])
    )
    assert not ratio.requires_grad
    wide = density_ratio(logits, (1e-9, 1e9))
    torch.testing.assert_close(wide[1:], torch.tensor([-10.0, 10.0]).exp())


def test_bins_are_equal_and_hold_both_ends() -> None:
    t = torch.tensor([0.2, 0.29, 0.31, 0.65, 0.7], dtype=torch.float64)
    assert time_bin(t, 0.2, 0.7, 5).tolist() == [0, 0, 1, 4, 4]


def test_bin_means_move_only_where_a_bin_has_values() -> None:
    index = torch.tensor([0, 2, 2, 0])
    stats = bin_stats(torch.tensor([1.0, 2.0, 5.0, 6.0]), index, 4)
    assert stats.tolist() == [[2, 0, 2, 0], [7, 0, 7, 0]]
    start = torch.tensor([1.0, 1.0, 2.0, 9.0])
    assert update_bins(start, stats, 0.0).tolist() == [3.5, 1.0, 3.5, 9.0]
    assert update_bins(start, stats, 0.75).tolist() == [1.625, 1.0, 2.375, 9.0]
    assert torch.equal(update_bins(start, stats / 2, 0.75), update_bins(start, stats, 0.75))
