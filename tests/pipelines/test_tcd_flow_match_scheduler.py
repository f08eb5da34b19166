"""The TCD scheduler for flow models takes our sampler's steps, with Diffusers alone."""

# Shapes: B batch, C channels, H, W.

from __future__ import annotations

import ast
import logging
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler
from support.fixed import EMPTY, SHAPE, Fixed, network

from stepdistill.core.path import FlowPath
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.times import uniform_grid
from stepdistill.export.flow_grid import flow_match_config
from stepdistill.loading.project_code import part_class, project_file

FlowMatchTCDScheduler: Any = part_class("tcd_flow_match_scheduler", "FlowMatchTCDScheduler")


def loop(scheduler: Any, noise: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Four steps, all noise from one generator."""
    scheduler.set_timesteps(4)
    x, generator = noise, torch.Generator().manual_seed(seed)
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, float(t)), t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
def test_it_takes_our_samplers_steps(gamma: float, shift: float, tmp_path: Any) -> None:
    times = uniform_grid(4, shift)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    FlowMatchTCDScheduler(gamma=gamma, **flow_match_config(times)).save_pretrained(tmp_path)
    loaded = FlowMatchTCDScheduler.from_pretrained(tmp_path)
    assert loaded.config.gamma == gamma
    drawn = torch.Generator().manual_seed(1)
    ours = sample_x0(
        Fixed(FlowPath(), "flow"),
        SamplerSpec(times, "tcd", gamma=gamma) if gamma else SamplerSpec(times, "ode"),
        noise,
        EMPTY,
        fresh_noise=lambda _step: torch.randn(SHAPE, generator=drawn),
    )
    torch.testing.assert_close(loop(loaded, noise), ours, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("gamma", "stock"), [(0.0, FlowMatchEulerDiscreteScheduler), (1.0, FlowMatchLCMScheduler)]
)
def test_its_ends_are_the_stock_schedulers(gamma: float, stock: Any) -> None:
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    config = flow_match_config(uniform_grid(4, 3.0))
    theirs = loop(stock(**config), noise)
    torch.testing.assert_close(
        loop(FlowMatchTCDScheduler(gamma=gamma, **config), noise), theirs, rtol=0, atol=2e-5
    )
    between = loop(FlowMatchTCDScheduler(gamma=0.5, **config), noise)
    assert float((between - theirs).abs().max()) > 0.05


def test_loading_it_says_nothing(tmp_path: Any, caplog: Any) -> None:
    FlowMatchTCDScheduler(gamma=0.2, shift=3.0).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert FlowMatchTCDScheduler.from_pretrained(tmp_path).config.shift == 3.0
    assert not caplog.records


def test_times_per_token_are_refused() -> None:
    scheduler = FlowMatchTCDScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="one time for all tokens"):
        scheduler.step(x, scheduler.timesteps[0], x, per_token_timesteps=x)


def test_the_file_needs_diffusers_and_torch_alone() -> None:
    tree = ast.parse(project_file("tcd_flow_match_scheduler").read_text())
    found = [
        node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    own = {"__future__", "typing", "inspect", "torch", "diffusers"}
    assert {str(name).split(".")[0] for name in found} == own
