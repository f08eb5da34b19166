"""The anchored scheduler takes our anchored sampler's steps, with Diffusers alone."""

# Shapes: B batch, C channels, H, W.

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from stepdistill.core.path import FlowPath, VPPath
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.export.schedulers import stock_sampler
from stepdistill.testing.analytic import GaussianTeacher

FILE = Path(__file__).parents[2] / "pipelines" / "rectified_flow_scheduler.py"
_spec: Any = importlib.util.spec_from_file_location("rectified_flow_scheduler", FILE)
module: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module)
SHAPE = (2, 1, 2, 2)


def swapped(num_steps: int, shift: float = 1.0, name: str = "AnchoredFlowMatchScheduler") -> Any:
    """That scheduler in place of the Euler one that export writes for these steps."""
    spec = SamplerSpec(uniform_grid(num_steps, shift), "ode")
    euler = stock_sampler(FlowMatchEulerDiscreteScheduler(), FlowPath(), spec).scheduler
    made = getattr(module, name).from_config(euler.config)
    made.set_timesteps(num_steps)
    return made


def loop(scheduler: Any, teacher: GaussianTeacher, noise: torch.Tensor, cond: Cond) -> torch.Tensor:
    x = noise
    for t in scheduler.timesteps:
        at = torch.full((len(x),), float(t) / 1000.0, dtype=torch.float64)
        x = scheduler.step(teacher(x, at, cond).flow.float(), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_it_takes_the_anchored_samplers_steps(num_steps, shift):
    teacher, cond = GaussianTeacher(FlowPath(), 0.5, "flow"), Cond({"mean": torch.ones(SHAPE)})
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    found = loop(swapped(num_steps, shift), teacher, noise, cond)
    grid = uniform_grid(num_steps, shift)
    ours, euler = (
        sample_x0(teacher, SamplerSpec(grid, kind), noise, cond) for kind in ("anchored", "ode")
    )
    torch.testing.assert_close(found, ours.float(), rtol=1e-5, atol=1e-5)
    # Euler's first step too leads to (1 - s) x0 + s z: on a curved field the third one parts.
    assert torch.allclose(found, euler.float(), atol=1e-3) == (num_steps <= 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("HeunFlowMatchScheduler", "ode"), ("AnchoredHeunFlowMatchScheduler", "anchored")],
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_heuns_rule_is_our_samplers(num_steps, shift, name, kind):
    teacher, cond = GaussianTeacher(FlowPath(), 0.5, "flow"), Cond({"mean": torch.ones(SHAPE)})
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    scheduler = swapped(num_steps, shift, name)
    spec = SamplerSpec(uniform_grid(num_steps, shift), kind, heun=True)
    assert len(scheduler.timesteps) == scheduler.num_inference_steps == spec.num_calls
    found = loop(scheduler, teacher, noise, cond)
    ours = sample_x0(teacher, spec, noise, cond)
    torch.testing.assert_close(found, ours.float(), rtol=1e-5, atol=1e-5)
    scheduler.set_timesteps(num_steps)  # a second call begins anew
    torch.testing.assert_close(loop(scheduler, teacher, noise, cond), found, rtol=0, atol=0)


def test_heun_on_equal_sigmas_is_the_stock_one():
    teacher, cond = GaussianTeacher(FlowPath(), 0.5, "flow"), Cond({"mean": torch.ones(SHAPE)})
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    stock = FlowMatchHeunDiscreteScheduler()
    stock.set_timesteps(4)
    made = module.HeunFlowMatchScheduler()
    made.set_timesteps(4)
    torch.testing.assert_close(made.sigmas, stock.sigmas)
    found, theirs = (loop(s, teacher, noise, cond) for s in (made, stock))
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)  # theirs divides by 1e-3


@pytest.mark.parametrize("view", ["eps", "v", "x0"])
@pytest.mark.parametrize(("kind", "heun"), [("anchored", False), ("anchored", True), ("ode", True)])
@pytest.mark.parametrize("num_steps", [2, 3, 4])
def test_tables_take_the_same_rules(num_steps, kind, heun, view):
    """The saved scheduler of an eps, v or x0 student on Stable Diffusion's table."""
    names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    base = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=names[view],
    )
    path = VPPath(base.alphas_cumprod)
    teacher, cond = GaussianTeacher(path, 0.5, view), Cond({"mean": torch.ones(SHAPE)})
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    times = tuple(path.snap(torch.tensor(uniform_grid(num_steps))).tolist())
    spec = SamplerSpec(times, kind, heun=heun)
    scheduler = stock_sampler(base, path, spec).scheduler
    for _ in range(2):  # a second call begins anew
        scheduler.set_timesteps(num_steps)
        assert len(scheduler.timesteps) == spec.num_calls
        x = noise
        for t in scheduler.timesteps:
            out = teacher(x, path.time_of(t).expand(len(x)), cond).as_type(view)
            x = scheduler.step(out.float(), t, x, return_dict=False)[0]
        torch.testing.assert_close(x, sample_x0(teacher, spec, noise, cond), rtol=0, atol=2e-5)
    scheduler.set_timesteps(num_steps)
    with pytest.raises(ValueError, match="pure noise, got a start at step"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_a_second_call_has_a_noise_of_its_own():
    teacher, cond = GaussianTeacher(FlowPath(), 0.5, "flow"), Cond({"mean": torch.ones(SHAPE)})
    first, second = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1))
    scheduler = swapped(2)
    loop(scheduler, teacher, first, cond)
    scheduler.set_timesteps(2)
    again = loop(scheduler, teacher, second, cond)
    torch.testing.assert_close(again, loop(swapped(2), teacher, second, cond), rtol=0, atol=0)


def test_a_start_below_pure_noise_is_refused():
    scheduler = swapped(2)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="pure noise, got a start at step 1"):
        scheduler.step(x, scheduler.timesteps[1], x)


def test_the_file_needs_diffusers_and_torch_alone():
    found = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(ast.parse(FILE.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert {str(name).split(".")[0] for name in found} == {
        "__future__",
        "typing",
        "torch",
        "diffusers",
    }
