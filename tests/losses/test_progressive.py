"""The target and weights of progressive distillation, against rectified-flow secants."""

from __future__ import annotations

import pytest
import torch
from support.jumps import SETTINGS, SHAPE

from stepdistill.core.path import expand
from stepdistill.losses.progressive import progressive_target, progressive_weight

BSZ = 8


def drawn(setting: str):
    """path, x_u, x_s, u, s: random points, the last rows stepping to clean data."""
    path = SETTINGS[setting][0]
    generator = torch.Generator().manual_seed(0)
    x_u, x_s = (torch.randn(BSZ, *SHAPE, generator=generator).double() for _ in range(2))
    u = torch.linspace(1.0, 0.25, BSZ, dtype=torch.float64)
    s = torch.where(torch.arange(BSZ) < BSZ - 2, u - 0.25, 0.0)
    return path, x_u, x_s, u, s


@pytest.mark.parametrize("setting", ["vp", "flow"])
def test_the_step_from_the_target_ends_at_x_s(setting) -> None:
    path, x_u, x_s, u, s = drawn(setting)
    target = progressive_target(path, x_u, x_s, u, s)
    torch.testing.assert_close(path.step(target, x_u, u, s), x_s, rtol=0, atol=1e-10)


@pytest.mark.parametrize("setting", ["vp", "flow"])
def test_target_is_the_rectified_flow_secant(setting) -> None:
    """v = (x_s / c_s - x_u / c_u) / (t_s - t_u) with c = alpha + sigma, t = sigma / c."""
    path, x_u, x_s, u, s = drawn(setting)
    (alpha_u, sigma_u), (alpha_s, sigma_s) = path.coeffs(u), path.coeffs(s)
    c_u, c_s = alpha_u + sigma_u, alpha_s + sigma_s
    t_u, t_s = sigma_u / c_u, sigma_s / c_s
    secant = (x_s / expand(c_s, x_s) - x_u / expand(c_u, x_u)) / expand(t_s - t_u, x_u)
    oracle = path.to_x0(secant, x_u, u, "flow")
    found = progressive_target(path, x_u, x_s, u, s)
    torch.testing.assert_close(found, oracle, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("setting", ["vp", "flow"])
def test_the_last_step_s_target_is_the_teacher_s_x0(setting) -> None:
    path, x_u, x_s, u, s = drawn(setting)
    target = progressive_target(path, x_u, x_s, u, s)
    assert torch.equal(target[-2:], x_s[-2:])


@pytest.mark.parametrize("setting", ["vp", "flow"])
def test_weights_turn_x0_errors_into_errors_of_other_views(setting) -> None:
    path, x0, x_u, u, _ = drawn(setting)
    other = x0 + 0.1
    error = {
        kind: (path.convert(x0, x_u, u, "x0", kind) - path.convert(other, x_u, u, "x0", kind)) ** 2
        for kind in ("x0", "eps", "v", "flow")
    }
    scaled = {
        name: expand(progressive_weight(name, path, u), x0) * error["x0"]
        for name in ("snr_trunc", "1+snr", "flow")
    }
    torch.testing.assert_close(scaled["flow"], error["flow"])
    torch.testing.assert_close(scaled["snr_trunc"], torch.maximum(error["x0"], error["eps"]))
    torch.testing.assert_close(scaled["1+snr"], error["x0"] + error["eps"])
    if setting == "vp":
        torch.testing.assert_close(scaled["1+snr"], error["v"])


def test_unknown_weight_is_refused() -> None:
    path, _, _, u, _ = drawn("vp")
    with pytest.raises(ValueError, match="expected 'snr_trunc'"):
        progressive_weight("snr", path, u)  # type: ignore[arg-type]
