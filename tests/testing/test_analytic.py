"""The analytic teachers themselves, against numeric integration and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch

from stepdistill.core.path import FlowPath, NoisePath, VEPath, VPPath
from stepdistill.core.solvers import ode_solve
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.testing.analytic import GaussianTeacher, MixtureTeacher

VP = VPPath.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
PATHS = {"vp": VP, "flow": FlowPath(), "ve": VEPath(sigma_max=10.0)}


@pytest.fixture(params=sorted(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def mean_cond(value: float, bsz: int) -> Cond:
    return Cond({"mean": torch.full((bsz, 1, 1, 1), value, dtype=torch.float64)})


def numeric_mean(path: NoisePath, x: float, t: float, density: torch.Tensor) -> float:
    """E[x0 | x_t = x] by quadrature over x0 in [-6, 6]."""
    alpha, sigma = (float(c) for c in path.coeffs(torch.tensor([t])))
    weight = density * torch.exp(-0.5 * ((x - alpha * GRID) / sigma) ** 2)
    return float((weight * GRID).sum() / weight.sum())


GRID = torch.linspace(-6.0, 6.0, 60001, dtype=torch.float64)


@pytest.mark.parametrize("t", [0.3, 0.6, 0.95])
def test_gaussian_posterior_mean_is_the_integral(path: NoisePath, t: float) -> None:
    density = torch.exp(-0.5 * ((GRID - 0.7) / 0.4) ** 2)
    for x in (-1.0, 0.2, 2.0):
        got = GaussianTeacher(path, 0.4)(
            torch.full((1, 1, 1, 1), x).double(), torch.tensor([t]), mean_cond(0.7, 1)
        ).x0
        assert float(got) == pytest.approx(numeric_mean(path, x, t, density), abs=1e-6)


@pytest.mark.parametrize("t", [0.3, 0.6, 0.95])
def test_mixture_posterior_mean_is_the_integral(path: NoisePath, t: float) -> None:
    means, weights = torch.tensor([-1.0, 0.5, 2.0]), torch.tensor([0.2, 0.5, 0.3])
    teacher = MixtureTeacher(path, means.view(3, 1, 1, 1), 0.3, weights)
    parts = weights.view(-1, 1) * torch.exp(-0.5 * ((GRID - means.view(-1, 1)) / 0.3) ** 2)
    for x in (-1.0, 0.2, 2.0):
        got = teacher(torch.full((1, 1, 1, 1), x).double(), torch.tensor([t]), mean_cond(0.0, 1)).x0
        assert float(got) == pytest.approx(numeric_mean(path, x, t, parts.sum(0)), abs=1e-6)


def test_mixture_of_one_is_the_gaussian(path: NoisePath) -> None:
    gen = torch.Generator().manual_seed(0)
    means = torch.randn(1, 2, 3, 3, generator=gen, dtype=torch.float64)
    x_t = torch.randn(4, 2, 3, 3, generator=gen, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.8, 1.0]).double()
    cond = Cond({"mean": means.expand(4, -1, -1, -1)})
    one = MixtureTeacher(path, means, 0.6)(x_t, t, cond).x0
    assert (one - GaussianTeacher(path, 0.6)(x_t, t, cond).x0).abs().max() < 1e-12


def test_mixture_sample_has_the_mixture_moments() -> None:
    teacher = MixtureTeacher(
        FlowPath(), torch.tensor([-1.0, 3.0]).view(2, 1, 1), 0.5, torch.tensor([0.75, 0.25])
    )
    draws = teacher.sample(20000, torch.Generator().manual_seed(0))
    assert float(draws.mean()) == pytest.approx(0.0, abs=0.06)  # 5 standard errors
    assert float(draws.var()) == pytest.approx(0.25 + 3.0, rel=0.05)


def test_flow_map_composes_and_inverts(path: NoisePath) -> None:
    teacher, cond = GaussianTeacher(path, 0.5), mean_cond(0.3, 3)
    x = torch.randn(3, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, u, s = (torch.full((3,), v).double() for v in (0.9, 0.5, 0.1))
    direct = teacher.flow_map(x, t, s, cond)
    assert (teacher.flow_map(teacher.flow_map(x, t, u, cond), u, s, cond) - direct).abs().max() < (
        1e-12
    )
    assert (teacher.flow_map(direct, s, t, cond) - x).abs().max() < 1e-11
    assert torch.allclose(teacher.flow_map(x, t, t, cond), x)


def test_flow_map_transports_the_marginal(path: NoisePath) -> None:
    """A point z standard deviations out stays z standard deviations out."""
    teacher, cond = GaussianTeacher(path, 0.5), mean_cond(0.3, 1)
    t, s = torch.tensor([0.8]).double(), torch.tensor([0.2]).double()

    def at(time: torch.Tensor, z: float) -> torch.Tensor:
        alpha, sigma = path.coeffs(time)
        return (alpha * 0.3 + z * (alpha**2 * 0.25 + sigma**2).sqrt()).view(1, 1, 1, 1)

    assert torch.allclose(teacher.flow_map(at(t, 1.7), t, s, cond), at(s, 1.7), atol=1e-12)


def test_ode_solve_converges_at_first_order(path: NoisePath) -> None:
    """Error ~ O(1/K) against the exact flow map: halving the step halves the error."""
    teacher, cond = GaussianTeacher(path, 0.5), mean_cond(0.3, 8)
    gen = torch.Generator().manual_seed(0)
    noise = torch.randn(8, 1, 1, 1, generator=gen, dtype=torch.float64)
    one, zero = torch.ones(8).double(), torch.zeros(8).double()
    exact = teacher.flow_map(path.prior(noise), one, zero, cond)
    errors = [
        float((ode_solve(teacher, noise, cond, times=uniform_grid(k)) - exact).abs().mean())
        for k in (25, 50, 100, 200)
    ]
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert all(1.7 < r < 2.4 for r in ratios), (errors, ratios)


def test_ddim_is_exact_for_a_point(path: NoisePath) -> None:
    teacher, cond = GaussianTeacher(path, 0.0), mean_cond(0.3, 2)
    noise = torch.randn(2, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    for k in (1, 3):
        x0 = ode_solve(teacher, noise, cond, times=uniform_grid(k))
        assert (x0 - 0.3).abs().max() < 1e-9


def test_guided_gaussian_is_a_gaussian_with_a_moved_mean() -> None:
    """mu' = mu_u + g (mu_c - mu_u), so guided solving ends where the moved teacher ends."""
    teacher = GaussianTeacher(FlowPath(), 0.5)
    noise = torch.randn(2, 1, 1, 1, generator=torch.Generator().manual_seed(0)).double()
    guided = ode_solve(teacher, noise, mean_cond(1.0, 2), mean_cond(0.2, 2), 3.0)
    moved = ode_solve(teacher, noise, mean_cond(0.2 + 3.0 * 0.8, 2))
    assert (guided - moved).abs().max() < 1e-10
