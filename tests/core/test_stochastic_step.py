"""Steps of the teacher's SDE against its law in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from support.jumps import FLOW, SHAPE, VP, Ctx64, batch
from torch import Tensor

from stepdistill.core.path import VEPath
from stepdistill.core.solvers import stochastic_step, teacher_step
from stepdistill.testing.analytic import GaussianTeacher

PATHS = {"vp": VP, "flow": FLOW, "ve": VEPath()}


class OneNoise:
    """Unit noise for row i at the i-th draw alone; row 0 has none: what each draw ends as."""

    def __init__(self) -> None:
        self.draws = 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        self.draws += 1
        noise = torch.zeros(shape, dtype=torch.float64)
        noise[self.draws] = 1.0
        return noise


def law(path, eta: float, steps: int, std: float = 0.5, t: float = 0.8, s: float = 0.5):
    """(gain, variance) of x_s given x_t at t, of N(0.7, std^2) data."""
    bsz, teacher, one = steps + 1, GaussianTeacher(path, std), OneNoise()
    cond = batch(bsz).cond
    now, later = (torch.full((bsz,), u, dtype=torch.float64) for u in (t, s))
    args = {"eta": eta, "num_steps": steps, "randn": one}
    ends = [
        stochastic_step(
            teacher, torch.full((bsz, *SHAPE), x).double(), now, later, cond, None, 1.0, **args
        )
        for x in (0.0, 1.0)
        if not setattr(one, "draws", 0)
    ]
    assert one.draws == (steps if eta else 0)
    parts = ends[0][1:] - ends[0][:1]
    return float((ends[1] - ends[0])[0].mean()), float((parts**2).mean((1, 2, 3)).sum())


def exact_law(path, eta: float, std: float = 0.5, t: float = 0.8, s: float = 0.5):
    """That of infinitely many steps: see `stochastic_step`."""
    now, later = (path.coeffs(torch.tensor([u], dtype=torch.float64)) for u in (t, s))
    (a, b), (a_s, b_s) = [[float(c) for c in pair] for pair in (now, later)]
    var, var_s = a**2 * std**2 + b**2, a_s**2 * std**2 + b_s**2
    root = (var_s / var) ** 0.5
    gain = root * (a / a_s * root) ** (eta**2)
    return gain, var_s - gain**2 * var


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("setting", PATHS)
def test_many_steps_reach_the_sde_s_mean_and_variance(setting, eta) -> None:
    """To first order in their length; the variance follows eta, the marginal stays. At eta 1 one
    step's mean is exact already: DDPM's."""
    path = PATHS[setting]
    exact = exact_law(path, eta)
    errors = []
    for steps in (30, 60):
        found = law(path, eta, steps)
        errors.append([abs(a - b) / max(b, 1e-3) for a, b in zip(found, exact, strict=True)])
    assert errors[1][0] < 0.03
    if eta < 1.0:
        assert errors[0][0] / errors[1][0] == pytest.approx(2.0, rel=0.15)
    else:
        assert errors[1][0] < 1e-9
    if eta == 0.0:
        assert law(path, eta, 30)[1] == 0.0
        assert exact[1] == pytest.approx(0.0, abs=1e-12)
    else:
        assert errors[1][1] < 0.1
        assert errors[0][1] / errors[1][1] == pytest.approx(2.0, rel=0.2)


def test_the_reverse_sde_is_the_posterior_of_the_forward_process() -> None:
    """eta 1: gain cov(x_s, x_t) / V_t = alpha_t V_s / (alpha_s V_t) by the forward kernel."""
    for path in PATHS.values():
        a, b = (float(c) for c in path.coeffs(torch.tensor([0.8], dtype=torch.float64)))
        a_s, b_s = (float(c) for c in path.coeffs(torch.tensor([0.5], dtype=torch.float64)))
        var, var_s = a**2 / 4 + b**2, a_s**2 / 4 + b_s**2
        assert exact_law(path, 1.0)[0] == pytest.approx(a / a_s * var_s / var)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_variance_of_one_step_is_ddim_s(eta) -> None:
    """std^2 = eta^2 sigma_s^2 (1 - l_s^2 / l_t^2)."""
    for path in PATHS.values():
        a, b = (float(c) for c in path.coeffs(torch.tensor([0.8], dtype=torch.float64)))
        a_s, b_s = (float(c) for c in path.coeffs(torch.tensor([0.5], dtype=torch.float64)))
        expected = eta**2 * b_s**2 * (1 - (b_s * a / (a_s * b)) ** 2)
        assert law(path, eta, 1)[1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("setting", PATHS)
def test_more_steps_of_the_ode_come_nearer_to_the_flow_map(setting) -> None:
    path = PATHS[setting]
    exact = exact_law(path, 0.0, s=0.7)[0]
    errors = [abs(law(path, 0.0, steps, s=0.7)[0] - exact) for steps in (1, 3)]
    assert errors[1] < 0.4 * errors[0]


@pytest.mark.full
@pytest.mark.parametrize("setting", ["vp", "flow"])
def test_its_fixed_point_goes_from_the_flow_map_to_the_mean(setting) -> None:
    """The expected target E[f(x_s) | x_t] equals f(x_t): at eta 0 for the flow map's end, whose
    slope is std / sqrt(V); at eta 1 for E[x0 | x_t], whose slope is alpha std^2 / V."""
    path = PATHS[setting]

    def slope(t: float, mean: bool) -> float:
        a, b = (float(c) for c in path.coeffs(torch.tensor([t], dtype=torch.float64)))
        var = a**2 / 4 + b**2
        return a / 4 / var if mean else 0.5 / var**0.5

    for eta, mean in ((0.0, False), (1.0, True)):
        rest = {
            m: slope(0.5, m) * law(path, eta, 60)[0] / slope(0.8, m) - 1 for m in (mean, not mean)
        }
        assert abs(rest[mean]) < 0.02
        assert abs(rest[not mean]) > 0.2
    # Between them the map's slope falls by a share of eta^2 of that of eta 1.
    ends = [slope(0.5, False) * law(path, eta, 200)[0] / slope(0.8, False) for eta in (0.3, 1.0)]
    assert math.log(ends[0]) == pytest.approx(0.09 * math.log(ends[1]), rel=0.03)


def test_one_step_without_noise_is_the_teacher_s_step() -> None:
    data = batch(8)
    for path in PATHS.values():
        t, s = (torch.full((8,), u, dtype=torch.float64) for u in (1.0, 0.7))
        args = (GaussianTeacher(path, 0.5), data.x0, t, s, data.cond, data.null, 2.0)
        one = stochastic_step(*args, eta=0.0, num_steps=1, randn=Ctx64().randn)
        assert torch.equal(one, teacher_step(*args))
