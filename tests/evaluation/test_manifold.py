"""Precision, recall, density and coverage on sets whose scores are known."""

import pytest
import torch

from stepdistill.evaluation.manifold import manifold_scores


def normal(count: int, seed: int, width: int = 4) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_identical_sets_score_one() -> None:
    x = normal(60, 0)
    scores = manifold_scores(x, x.clone())
    assert (scores.precision, scores.recall, scores.coverage) == (1, 1, 1)


def test_far_apart_sets_score_zero() -> None:
    scores = manifold_scores(normal(60, 0), normal(60, 1) + 100)
    assert (scores.precision, scores.recall, scores.density, scores.coverage) == (0, 0, 0, 0)


def test_one_of_two_modes_gives_full_precision_and_half_recall() -> None:
    near, far = normal(100, 0), normal(100, 1) + 50
    scores = manifold_scores(torch.cat([near, far]), near)
    assert scores.precision == 1
    assert scores.recall == 0.5
    assert scores.coverage == 0.5


def test_a_point_mass_has_precision_without_recall() -> None:
    real = normal(200, 0)
    scores = manifold_scores(real, real.mean(0).expand(200, -1).clone())
    assert scores.precision == 1
    assert scores.recall == 0


def test_extra_outliers_lower_precision_only() -> None:
    real = normal(100, 0)
    scores = manifold_scores(real, torch.cat([real, normal(100, 1) + 50]))
    assert scores.precision == 0.5
    assert scores.recall == 1


def test_hand_made_line() -> None:
    """Real 0, 1, 3 with k = 1 has radii 1, 1, 2; generated 1.5, 6, 7 has radii 4.5, 1, 1."""
    real = torch.tensor([[0.0], [1.0], [3.0]])
    generated = torch.tensor([[1.5], [6.0], [7.0]])
    scores = manifold_scores(real, generated, k=1)
    assert scores.precision == pytest.approx(1 / 3)  # only 1.5, within 1 of 1 and 2 of 3
    assert scores.recall == 1  # the ball of 1.5 reaches -3..6
    assert scores.density == pytest.approx(2 / 3)
    assert scores.coverage == pytest.approx(2 / 3)  # the balls of 1 and 3 hold 1.5


def test_roles_swap_precision_and_recall() -> None:
    x, y = normal(80, 0), normal(80, 1) * 2
    one, two = manifold_scores(x, y), manifold_scores(y, x)
    assert (one.precision, one.recall) == (two.recall, two.precision)


def test_rejects_too_few_samples() -> None:
    with pytest.raises(ValueError, match="generated: expected features of shape"):
        manifold_scores(normal(10, 0), normal(3, 1), k=3)
