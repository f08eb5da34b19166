"""At the sampler's first time a student is trained on what sampling feeds it: pure noise.

A VP table's last entry has alpha = 0.068 (Stable Diffusion), and sigma_max is not infinite: noised
data keep a trace of x0 there, which no sampler has.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.jumps import FLOW, VP, Ctx64, batch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Method, Setting
from stepdistill.core.path import NoisePath, VEPath
from stepdistill.core.solvers import sample_x0
from stepdistill.methods import METHODS
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lcm": ("consistency", {"target": "self", "num_grid": 4, "num_steps": 1}),
    "cd": ("consistency", {"target": "self", "num_grid": 4, "num_steps": 1, "solver": "heun"}),
    "ct": ("consistency", {"target": "self", "num_grid": 4, "num_steps": 1, "solver": "data"}),
    "tscd": ("tscd", {"num_grid": 8}),
    "pcm": ("pcm", {"num_grid": 8}),
    "ctm": ("ctm", {"num_grid": 8, "solver_steps": 4}),
    "guidance": ("lora_guidance", {"states": "data"}),
    "halving": ("lora_guidance", {"states": "data", "guidance_stage": False, "num_steps": (4,)}),
}
PATHS: dict[str, NoisePath] = {"vp": VP, "flow": FLOW, "ve": VEPath()}
CONTINUOUS = {("guidance", "flow"), ("guidance", "ve")}  # t = 1 has no mass there


class Recorder(Denoiser):
    """Remembers its inputs; half of x_t is its x0."""

    def __init__(self, path: NoisePath) -> None:
        self.path, self.kind = path, "x0"
        self.seen: list[tuple[Tensor, Tensor]] = []

    def raw(self, x_t: Tensor, t: Tensor, cond: Any, w: Any, features: Any):
        self.seen.append((x_t, t))
        return 0.5 * x_t, {}


class Draws(Ctx64):
    """Remembers the noise drawn."""

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        self.drawn = super().randn(shape)
        return self.drawn


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("case", CASES)
def test_first_time_is_trained_on_the_samplers_first_input(case: str, path: str) -> None:
    if (case, path) in CONTINUOUS or (path == "ve" and case in ("tscd", "pcm")):
        pytest.skip("no grid of that method there")
    name, options = CASES[case]
    cls: type[Method[Any]] = METHODS[name]
    guidance = {"guidance": 3.0} if name == "lora_guidance" else {"guidance_range": (1.0, 1.0)}
    method = cls(cls.Config(**options, **guidance), Setting(PATHS[path], "x0"))
    student, data = Recorder(PATHS[path]), batch(4096, mean=3.0, std=0.5)
    teacher = GaussianTeacher(PATHS[path], 0.5)
    nets = AnalyticNets({"teacher": teacher, "student": student, "target": student})
    draws = Draws(seed=1, max_steps=1000)
    (phase,) = method.phases(0)
    phase.loss(nets, data, draws)
    inputs, t = student.seen[0] if case != "halving" else student.seen[-1]
    sampled = Recorder(PATHS[path])
    fresh = lambda step: draws.drawn  # noqa: E731
    sample_x0(sampled, method.sampler(), draws.drawn, data.cond, fresh_noise=fresh)
    first, at = sampled.seen[0]
    rows = (t - at).abs() < 1e-9
    assert int(rows.sum()) > 0
    assert torch.equal(inputs[rows], first[rows])
    assert bool((~rows).any()) or case == "halving"
    assert float((inputs - first)[~rows].abs().mean()) > 0.1
