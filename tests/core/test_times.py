"""Grids and time laws against closed forms and the schedules stock schedulers build."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler

from stepdistill.core.path import FlowPath, VEPath, VPPath
from stepdistill.core.times import (
    beta_times,
    grid_times,
    logit_normal_times,
    shift_times,
    snapped_grid,
    u_shaped_times,
    uniform_grid,
    uniform_times,
    unshift_times,
)


@pytest.mark.parametrize(
    ("num_steps", "shift", "expected"),
    [
        (1, 1.0, [1.0]),
        (2, 1.0, [1.0, 0.5]),
        (4, 1.0, [1.0, 0.75, 0.5, 0.25]),
        (2, 3.0, [1.0, 0.75]),
        (4, 3.0, [1.0, 0.9, 0.75, 0.5]),
        (4, 5.0, [1.0, 0.9375, 0.83333333333, 0.625]),
    ],
)
def test_uniform_grid_values(num_steps: int, shift: float, expected: list[float]) -> None:
    assert uniform_grid(num_steps, shift) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 8, 50])
def test_uniform_grid_is_trailing_spacing(num_steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    path = VPPath(scheduler.alphas_cumprod)
    ours = path.model_time(torch.tensor(uniform_grid(num_steps), dtype=torch.float64))
    assert ours.tolist() == scheduler.timesteps.double().tolist()


def test_uniform_grid_refuses_no_steps() -> None:
    with pytest.raises(ValueError, match="num_steps >= 1"):
        uniform_grid(0)


def test_shift_multiplies_the_noise_to_signal_ratio() -> None:
    t = torch.linspace(0.01, 0.99, 33, dtype=torch.float64)
    shifted = shift_times(t, 3.0)
    assert (shifted / (1 - shifted) / (t / (1 - t)) - 3.0).abs().max() < 1e-11
    assert (unshift_times(shifted, 3.0) - t).abs().max() < 1e-14


def test_u_shaped_law_is_the_closed_form_inverse_and_its_mirror() -> None:
    """y with (e^(a y) - 1) / (e^a - 1) = 2 u below 1/2, and 1 - y of 2 u - 1 above."""
    u = torch.tensor([0.0, 0.25, 0.5, 0.75], dtype=torch.float64)
    y = math.log(1.0 + 0.5 * (math.exp(4.0) - 1.0)) / 4.0
    assert u_shaped_times(u, 4.0).tolist() == pytest.approx([0.0, y, 1.0, 1.0 - y], abs=1e-14)
    found = u_shaped_times(u, 4.0, 0.2, 0.6).tolist()
    assert found == pytest.approx([0.2, 0.2 + 0.4 * y, 0.6, 0.6 - 0.4 * y], abs=1e-14)


def test_uniform_and_grid_laws() -> None:
    u = torch.tensor([0.0, 0.3, 0.999999999])
    assert uniform_times(u, 0.2, 0.6).tolist() == pytest.approx([0.2, 0.32, 0.6])
    drawn, index = grid_times(u, (1.0, 0.75, 0.5, 0.25))
    assert drawn.tolist() == [1.0, 0.75, 0.25]
    assert index.tolist() == [0, 1, 3]


def test_a_grid_s_times_are_the_nearest_that_the_teacher_knows() -> None:
    assert snapped_grid(FlowPath(), 4, 3.0) == uniform_grid(4, 3.0)
    table = VPPath.from_betas(torch.full((10,), 0.1))
    assert snapped_grid(table, 4) == pytest.approx((1.0, 0.8, 0.5, 0.2))  # halves round to even
    assert snapped_grid(table, 10) == pytest.approx(uniform_grid(10))
    edm = VEPath()
    assert snapped_grid(edm, 9)[-2:] == (pytest.approx(2 / 9), edm.lowest)


@pytest.mark.parametrize(
    ("path", "shift", "num_steps", "most"),
    [
        (VEPath(), 1.0, 10, 9),
        (VEPath(), 1.0, 50, 9),
        (VPPath.from_betas(torch.full((10,), 0.1)), 1.0, 11, 10),
    ],
)
def test_a_grid_that_holds_a_time_twice_names_the_largest_that_does_not(
    path, shift, num_steps, most
):
    left = num_steps - len(set(path.snap(torch.tensor(uniform_grid(num_steps, shift))).tolist()))
    with pytest.raises(ValueError, match=f"at most {most}, got {num_steps}: .* {left} fall on"):
        snapped_grid(path, num_steps, shift)


@pytest.mark.parametrize(
    ("a", "b", "inverse"),
    [
        (1.0, 1.0, lambda u: u),
        (2.0, 1.0, lambda u: u.sqrt()),
        (1.0, 3.0, lambda u: 1.0 - (1.0 - u) ** (1.0 / 3.0)),
        (3.0, 1.0, lambda u: u ** (1.0 / 3.0)),
    ],
)
def test_beta_law_is_the_closed_form_inverse(a, b, inverse) -> None:
    """One of a, b at 1, where the distribution function is a power; linear within a cell."""
    u = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    torch.testing.assert_close(beta_times(u, a, b), inverse(u), rtol=0, atol=2e-6)


def test_beta_law_reaches_both_ends_and_is_symmetric() -> None:
    ends = torch.tensor([0.0, 1e-9, 1.0 - 1e-9, 1.0], dtype=torch.float64)
    assert beta_times(ends, 1.0, 1.0).tolist() == pytest.approx(ends.tolist(), abs=1e-12)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(beta_times(u, 2.0, 3.0), 1.0 - beta_times(1.0 - u, 3.0, 2.0))
    assert float(beta_times(torch.tensor([11.0 / 16.0]), 2.0, 3.0)) == pytest.approx(0.5, abs=1e-6)


def test_logit_normal_law_has_its_mean_and_deviation_in_logits() -> None:
    u = torch.special.ndtr(torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64))
    found = torch.logit(logit_normal_times(u, -0.4, 1.5))
    assert found.tolist() == pytest.approx([-1.9, -0.4, 2.6])
