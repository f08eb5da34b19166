"""Frechet and kernel distance against closed forms."""

import pytest
import torch

from stepdistill.evaluation.frechet import (
    frechet_distance,
    gaussian_frechet_distance,
    kernel_distance,
)


def normal(count: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_is_zero_for_the_same_set() -> None:
    x = normal(200, 16, 0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)


def test_is_symmetric() -> None:
    x, y = normal(200, 8, 0), normal(150, 8, 1) * 2 + 1
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


def test_shift_alone_gives_its_squared_length() -> None:
    x, shift = normal(300, 5, 0), torch.tensor([1.0, -2.0, 0.0, 0.5, 3.0])
    assert frechet_distance(x, x + shift) == pytest.approx(14.25, rel=1e-5)


@pytest.mark.parametrize(("s1", "s2"), [(1.0, 3.0), (0.5, 0.5), (2.0, 0.0)])
def test_one_dimensional_gaussians(s1: float, s2: float) -> None:
    distance = gaussian_frechet_distance(
        torch.tensor(1.0), torch.tensor(s1**2), torch.tensor(3.0), torch.tensor(s2**2)
    )
    assert distance == pytest.approx(4 + (s1 - s2) ** 2, rel=1e-9)


def test_commuting_covariances() -> None:
    rotation = torch.linalg.qr(normal(6, 6, 0).double()).Q
    a, b = torch.arange(1.0, 7).double(), torch.arange(6.0, 0, -1).double()
    zero = torch.zeros(6)
    distance = gaussian_frechet_distance(
        zero, rotation @ a.diag() @ rotation.T, zero, rotation @ b.diag() @ rotation.T
    )
    assert distance == pytest.approx(float((a.sqrt() - b.sqrt()).square().sum()), rel=1e-9)


def test_general_covariances_agree_with_the_matrix_square_root() -> None:
    x, y = normal(50, 4, 0).double(), normal(50, 4, 1).double() @ normal(4, 4, 2).double()
    c1, c2 = torch.cov(x.T), torch.cov(y.T)
    values = torch.linalg.eigvals(c1 @ c2).real.clamp_min(0)
    expected = c1.trace() + c2.trace() - 2 * values.sqrt().sum()
    zero = torch.zeros(4)
    assert gaussian_frechet_distance(zero, c1, zero, c2) == pytest.approx(float(expected), rel=1e-8)


def test_fewer_samples_than_dimensions_stays_real_and_finite() -> None:
    x, y = normal(10, 64, 0), normal(10, 64, 1)
    assert 0 < frechet_distance(x, y) < 1000


def test_kernel_distance_matches_the_double_loop() -> None:
    x, y = normal(7, 3, 0).double(), normal(5, 3, 1).double()

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (5 * 4)
    xy = sum(k(a, b) for a in x for b in y) / 35
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    values = [kernel_distance(normal(40, 4, 2 * i), normal(40, 4, 2 * i + 1)) for i in range(200)]
    spread = torch.tensor(values).std() / len(values) ** 0.5
    assert abs(sum(values) / len(values)) < 3 * float(spread)


@pytest.mark.parametrize("bad", [torch.zeros(5), torch.zeros(1, 4), torch.zeros(2, 3, 4)])
def test_rejects_what_is_no_feature_table(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"real: expected features of shape \(N >= 2, D\)"):
        frechet_distance(bad, torch.zeros(5, 4))


def test_rejects_nan_and_different_widths() -> None:
    with pytest.raises(ValueError, match="generated: expected finite"):
        frechet_distance(torch.zeros(4, 2), torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match="generated: expected feature width 2"):
        frechet_distance(torch.zeros(4, 2), torch.zeros(4, 3))
