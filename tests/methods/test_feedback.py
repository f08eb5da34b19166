"""feedback on analytic students: a linear reward's gradient, where the anchor holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.score import PATHS, Leaf, Recorder, batch_of
from torch import Tensor

from stepdistill.config.rewards import RewardConfig
from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import NoisePath
from stepdistill.core.types import Losses
from stepdistill.methods.feedback import Feedback, FeedbackConfig
from stepdistill.testing.analytic import AnalyticNets
from stepdistill.training.rewards import with_rewards

SLOPE = torch.tensor([2.0, -1.0], dtype=torch.float64)
GAIN = torch.tensor([[0.5, 0.0], [3.0, 1.0]], dtype=torch.float64)


class Decoded(AnalyticNets):
    """Networks whose images are a linear decoder's."""

    def images(self, latents: Tensor) -> Tensor:
        return latents @ GAIN.T


def slope(images: Tensor, by: object) -> Tensor:
    """A linear reward."""
    return images @ SLOPE


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def make(path: NoisePath, **config: Any) -> Feedback:
    return Feedback(FeedbackConfig(**config), Setting(path, "x0"))


def total(method: Feedback, nets: AnalyticNets, ctx: Ctx | None = None, **reward: Any) -> Losses:
    ctx, batch = ctx or Ctx(phase="student"), batch_of(4)
    one = RewardConfig(**{"kind": "slope", "weight": 0.3, **reward})
    losses = method.phases(0)[0].loss(nets, batch, ctx)
    return with_rewards(losses, nets, batch, ctx, method.sampler(), [one])


def students(path: NoisePath, offset: float = 0.0) -> tuple[Leaf, Leaf]:
    """The student, off by that from the reference."""
    begun = torch.linspace(-1, 1, 8, dtype=torch.float64).view(4, 2)
    return Leaf(path, begun + offset), Leaf(path, begun)


@pytest.mark.parametrize("anchor_on", ["x0", "v"])
def test_a_linear_reward_goes_through_the_decoder_and_the_anchor_pulls_back(
    path: NoisePath, anchor_on: str
) -> None:
    student, reference = students(path, 0.5)
    nets = Decoded({"student": student, "reference": reference}, scorers={"slope": slope})
    method = make(path, anchor=2.0, anchor_on=anchor_on)
    total(method, nets).total.backward()
    t = torch.tensor([method.rollout.times[0]], dtype=torch.float64)
    alpha, sigma = (float(c) for c in path.coeffs(t))
    view = {"x0": 1.0, "v": (alpha**2 / sigma + sigma) ** 2}[anchor_on]  # (dv / dx0)^2
    expected = -0.3 * (GAIN.T @ SLOPE) / 4 + 2.0 * 2 * 0.5 * view / 8
    torch.testing.assert_close(student.x0.grad, expected.expand(4, 2), rtol=1e-5, atol=1e-7)
    assert reference.x0.grad is None


def test_it_comes_to_rest_where_reward_and_anchor_balance() -> None:
    """x0_ref + w c N / (2 a): the anchor says how far a reward may push."""
    path = PATHS["flow"]
    student, reference = students(path)
    nets = Decoded({"student": student, "reference": reference}, scorers={"slope": slope})
    method = make(path, anchor=2.0)
    rest = reference.x0.detach() + 0.3 * (GAIN.T @ SLOPE) * 2 / (2 * 2.0)
    student.x0.data = rest.clone()
    total(method, nets).total.backward()
    torch.testing.assert_close(student.x0.grad, torch.zeros(4, 2).double(), rtol=0, atol=1e-7)


def test_a_student_at_its_reference_feels_no_anchor_and_none_is_kept_at_0() -> None:
    path = PATHS["vp"]
    student, reference = students(path)
    nets = Decoded({"student": student, "reference": reference}, scorers={"slope": slope})
    assert float(total(make(path), nets).logs["anchor"]) == 0.0
    alone = make(path, anchor=0.0)
    assert alone.roles().keys() == {"student"}
    assert make(path).roles()["reference"].ema_of == "student"
    total(alone, Decoded({"student": student}, scorers={"slope": slope})).total.backward()
    torch.testing.assert_close(
        student.x0.grad, -0.3 * (GAIN.T @ SLOPE).expand(4, 2) / 4, rtol=1e-6, atol=0
    )


def test_the_reward_judges_the_very_sample_of_the_anchor() -> None:
    """One call of the student with a graph, and its own steps before it without one."""
    path = PATHS["flow"]
    student, reference = students(path)
    seen, held = Recorder(student), Recorder(reference)
    nets = Decoded({"student": seen, "reference": held}, scorers={"slope": slope})
    method = make(path, num_steps=3, sampler="ode", trained_step="last")
    total(method, nets)
    assert [grad for *_, grad in seen.calls] == [False, False, True]
    assert [float(t[0]) for _, t, *_ in seen.calls] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert torch.equal(seen.calls[-1][0], held.calls[0][0])
    assert not held.calls[0][3]


def test_samples_above_tau_are_left_alone() -> None:
    student, reference = students(PATHS["flow"])
    nets = Decoded({"student": student, "reference": reference}, scorers={"slope": slope})
    scores = slope(nets.images(student.x0.detach()), ())
    tau = float(scores.sort().values[1:3].mean())
    total(make(PATHS["flow"]), nets, tau=tau).total.backward()
    pushed = student.x0.grad.abs().sum(1) > 0
    assert torch.equal(pushed, scores < tau)


def test_real_latents_may_begin_the_rollout() -> None:
    method = make(PATHS["flow"], num_steps=2, rollout="data")
    assert method.needs == {"cond", "x0"}
    assert method.phases(0)[0].reads_x0
    student, reference = students(PATHS["flow"])
    nets = Decoded({"student": student, "reference": reference})
    losses = method.phases(0)[0].loss(nets, replace(batch_of(4), x0=torch.zeros(4, 2)), Ctx())
    assert losses.sample is not None
