"""What a score costs inside a loss, and how its weight moves over a run."""

from __future__ import annotations

import pytest
import torch

from stepdistill.losses.rewards import ClampedCLIPConfig, LPIPSOptions, reward_loss


def test_a_score_costs_what_it_lacks_of_tau() -> None:
    score = torch.tensor([0.1, 0.4, -0.2], requires_grad=True)
    loss = reward_loss(score, 0.3)
    loss.backward()
    assert loss.item() == pytest.approx((0.2 + 0.0 + 0.5) / 3)
    torch.testing.assert_close(score.grad, torch.tensor([-1 / 3, 0.0, -1 / 3]))


def test_the_weight_goes_linearly_to_its_end() -> None:
    config = ClampedCLIPConfig(weight=1.0, weight_end=0.2)
    weights = [config.weight_at(step, 4) for step in range(5)]
    assert weights == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize(("first", "last"), [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)])
def test_a_weight_at_either_end_turns_it_on(first, last) -> None:
    assert ClampedCLIPConfig(weight=first, weight_end=last).enabled == (first + last > 0)


def test_a_limit_of_resizing_stands_beside_a_size() -> None:
    with pytest.raises(ValueError, match="expected resize beside it, got 256 alone"):
        LPIPSOptions(resize=None, resize_below=256)
    assert LPIPSOptions(resize=224, resize_below=256).resize_below == 256
    assert LPIPSOptions(resize=224, resize_below=None).resize == 224
    assert LPIPSOptions(resize=None, resize_below=None).resize is None


def test_tau_may_be_any_cosine_above_the_lowest() -> None:
    assert ClampedCLIPConfig(tau=-0.5).tau == -0.5
    with pytest.raises(ValueError, match="tau"):
        ClampedCLIPConfig(tau=-1.0)


def test_without_tau_a_score_is_to_grow_without_end() -> None:
    score = torch.tensor([0.1, 0.4, -0.2])
    assert reward_loss(score, None).item() == pytest.approx(-0.1)
