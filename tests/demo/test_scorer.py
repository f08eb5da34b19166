"""The demo's two judges know a digit from its prompt, are not the same, and reach the pixels."""

from __future__ import annotations

import pytest
import torch

from stepdistill.core.method import MethodConfig
from stepdistill.demo.data import DIGIT_NAMES, load_digit_splits, prompt_for
from stepdistill.demo.scorer import DigitScorer, HeldOutDigitScorer, register_scorers
from stepdistill.rewards import scorer_class

HELD_OUT = load_digit_splits().heldout
PROMPTS = [prompt_for(k) for k in range(len(DIGIT_NAMES))]


@pytest.fixture(params=[DigitScorer, HeldOutDigitScorer], scope="module")
def scorer(request: pytest.FixtureRequest) -> DigitScorer:
    made: DigitScorer = request.param(MethodConfig())
    return made.eval().requires_grad_(False)


@pytest.mark.full
def test_of_all_prompts_a_held_out_digit_s_own_fits_best(scorer: DigitScorer) -> None:
    images = HELD_OUT.images.expand(-1, 3, -1, -1)
    scores = torch.stack([scorer(images, [prompt] * len(images)) for prompt in PROMPTS], 1)
    assert float((scores.argmax(1) == HELD_OUT.labels).float().mean()) > 0.93
    own = scorer(images, HELD_OUT.prompts)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert float(own.mean()) > float(scorer(noise, HELD_OUT.prompts).mean()) + 0.3


@pytest.mark.full
def test_the_gradient_reaches_the_pixels_and_no_weight(scorer: DigitScorer) -> None:
    images = HELD_OUT.images[:4].expand(-1, 3, -1, -1).clone().requires_grad_()
    scorer(images, HELD_OUT.prompts[:4]).sum().backward()
    assert float(images.grad.abs().sum()) > 0
    assert all(p.grad is None for p in scorer.parameters())


def test_the_two_are_not_the_same_and_each_is_made_alike_again() -> None:
    before = torch.get_rng_state()
    one, two, again = (
        cls(MethodConfig()) for cls in (DigitScorer, HeldOutDigitScorer, DigitScorer)
    )
    assert torch.equal(torch.get_rng_state(), before)
    weights = [scorer.state_dict() for scorer in (one, two, again)]
    assert not torch.equal(weights[0]["text.weight"], weights[1]["text.weight"])
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_what_they_cannot_judge_is_said(scorer: DigitScorer) -> None:
    images = HELD_OUT.images[:2].expand(-1, 3, -1, -1)
    with pytest.raises(ValueError, match="expected prompts such as 'a handwritten seven'"):
        scorer(images, ["a cat", "a handwritten seven"])
    with pytest.raises(ValueError, match="expected images of 8 x 8 px"):
        scorer(images[..., :4], PROMPTS[:2])


def test_rewards_may_name_them() -> None:
    register_scorers()
    assert scorer_class("digits") is DigitScorer
    assert scorer_class("digits_held_out") is HeldOutDigitScorer
