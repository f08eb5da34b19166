"""The emoji's two judges know unseen pictures by their captions, better than chance."""

from __future__ import annotations

import pytest
import torch

from stepdistill.core.method import MethodConfig
from stepdistill.demo.emoji.captions import caption
from stepdistill.demo.emoji.scorer import EmojiScorer, HeldOutEmojiScorer, _shipped
from stepdistill.demo.scorer import register_scorers
from stepdistill.rewards import scorer_class


@pytest.mark.full
@pytest.mark.sampled_in_full("HeldOutEmojiScorer")
@pytest.mark.parametrize("cls", [EmojiScorer, HeldOutEmojiScorer])
def test_pictures_of_the_other_half_are_told_by_their_subgroups(cls: type[EmojiScorer]) -> None:
    scorer, emoji = cls(MethodConfig()), _shipped()
    index = torch.arange(1 - cls.part, len(emoji.entries), 2)
    shown = [caption(emoji.entries[k], "subgroup", False, False) for k in index.tolist()]
    known = sorted(set(shown))
    with torch.no_grad():
        cosines = scorer.embedded(emoji.images(0, index)) @ scorer.captions(known).T
    right = cosines.argmax(1) == torch.tensor([known.index(text) for text in shown])
    assert float(right.double().mean()) > 8 / len(known)
    images = emoji.images(0, index[:4]).requires_grad_()
    scorer.requires_grad_(False)(images, shown[:4]).sum().backward()
    assert float(images.grad.abs().sum()) > 0


@pytest.mark.full
def test_what_they_cannot_judge_is_said() -> None:
    scorer = EmojiScorer(MethodConfig(), weights=False)
    images = torch.zeros(1, 3, 64, 64)
    assert scorer(images, ["woman firefighter with medium dark skin in noto style"]).shape == (1,)
    with pytest.raises(ValueError, match="expected prompts such as 'slice of pizza"):
        scorer(images, ["a zyzzyva"])
    with pytest.raises(ValueError, match="expected images of 64 x 64 px"):
        scorer(images[..., :8], ["fruit"])


def test_rewards_may_name_them() -> None:
    register_scorers()
    assert scorer_class("emoji") is EmojiScorer
    assert scorer_class("emoji_held_out") is HeldOutEmojiScorer
