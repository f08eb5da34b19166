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


def test_values_that_are_no_numbers_are_refused() -> None:
    bad = normal(10, 0)
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="generated: expected finite features"):
        manifold_scores(normal(10, 0), bad)


def pair_by_pair(real: torch.Tensor, generated: torch.Tensor, k: int) -> tuple[float, ...]:
    """The four from differences of each pair, where copies are at exactly 0."""

    def far(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")

    radius = [far(x, x).kthvalue(k + 1, dim=1).values for x in (real, generated)]
    distance = far(real, generated)
    inside = distance <= radius[0][:, None]
    return (
        float(inside.any(0).double().mean()),
        float((distance <= radius[1][None]).any(1).double().mean()),
        float(inside.sum(0).double().mean() / k),
        float(inside.any(1).double().mean()),
    )


def plain(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> tuple[float, ...]:
    scores = manifold_scores(real, generated, k)
    return scores.precision, scores.recall, scores.density, scores.coverage


@pytest.mark.parametrize("centre", [0.0, 300.0])
@pytest.mark.parametrize("width", [1, 7, 512])
def test_equals_the_differences_of_each_pair(width, centre, monkeypatch) -> None:
    monkeypatch.setattr("stepdistill.evaluation.manifold.ROWS", 50)
    real = normal(130, 0, width) + centre
    generated = torch.cat([0.9 * normal(60, 1, width) + centre, real[20:70]])  # and copies
    generated = torch.cat([generated, generated[:5], generated[:5], generated[:5]])
    assert plain(real, generated) == pytest.approx(pair_by_pair(real, generated, 3), rel=1e-12)


def test_copies_lie_on_the_surface_of_their_originals_balls() -> None:
    """Each point's k neighbours and itself are within its radius: (k + 1) / k, none lost."""
    real = normal(150, 0, 512) * 3 + 40
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    assert plain(real, real[order]) == (1, 1, pytest.approx(4 / 3, rel=1e-12), 1)


def test_balls_of_radius_zero_hold_their_copies_alone() -> None:
    real = torch.cat([normal(1, 0, 512).expand(10, -1), normal(1, 1, 512).expand(10, -1)]) + 7
    near = real[:10] + 1e-3
    assert plain(real, torch.cat([real[:10], near]), k=3)[::3] == (0.5, 0.5)
