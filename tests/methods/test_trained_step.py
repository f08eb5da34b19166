"""trained_step: last sends the gradient through the sampler's last call alone, on every draw."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.path import FlowPath
from stepdistill.core.types import Batch, Cond
from stepdistill.methods.rollout import Rollout, RolloutConfig
from stepdistill.testing.analytic import AnalyticNets

TIMES = (1.0, 0.75, 0.5, 0.25)


class Recorder(Denoiser):
    """Remembers the times it was asked at, and whether with gradients."""

    def __init__(self) -> None:
        self.path, self.kind = FlowPath(), "x0"
        self.calls: list[tuple[float, bool]] = []

    def raw(self, x_t: Tensor, t: Tensor, cond: Cond, w, features):
        self.calls.append((float(t[0]), torch.is_grad_enabled()))
        return 0.5 * x_t, {}


@pytest.mark.parametrize("step", range(4))
def test_last_is_always_the_last(step) -> None:
    student = Recorder()
    config = RolloutConfig(num_steps=4, trained_step="last")
    cond = Cond({"c": torch.zeros(2, 1)})
    Rollout(config, student.path, TIMES)(
        AnalyticNets({"student": student}), Batch(cond, cond, (1, 2, 2)), Ctx(step=step)
    )
    assert student.calls == [(1.0, False), (0.75, False), (0.5, False), (0.25, True)]


def test_random_visits_every_step() -> None:
    seen = set()
    cond = Cond({"c": torch.zeros(2, 1)})
    for step in range(40):
        student = Recorder()
        Rollout(RolloutConfig(num_steps=4), student.path, TIMES)(
            AnalyticNets({"student": student}), Batch(cond, cond, (1, 2, 2)), Ctx(step=step)
        )
        seen.add(student.calls[-1][0])
    assert seen == set(TIMES)
