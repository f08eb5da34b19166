"""The judge counts right captions among twenty and is read back as it was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stepdistill.demo.emoji import judge as judge_module
from stepdistill.demo.emoji import ladder as ladder_module
from stepdistill.demo.emoji.captions import Entry, caption
from stepdistill.demo.emoji.data import Emoji
from stepdistill.demo.emoji.judge import EmojiFeatures, Retrieval, right_caption_first
from stepdistill.demo.emoji.ladder import floor, ladder, wide_set

ENTRIES = [Entry(str(k), f"thing{k}", "group", "subgroup", None, "noto") for k in range(40)]


class Exact(nn.Module):
    """Knows a picture's number by its first pixel."""

    def features(self, images):
        return torch.eye(40)[images[:, 0, 0, 0].long()]

    def read(self, captions):
        number = {caption(entry): k for k, entry in enumerate(ENTRIES)}
        return torch.eye(40)[[number[text] for text in captions]]


def test_a_picture_of_its_caption_counts_and_another_does_not() -> None:
    images = torch.arange(40.0)[:, None, None, None].expand(40, 3, 64, 64)
    assert right_caption_first(Exact(), images, ENTRIES, ENTRIES).all()
    wrong = right_caption_first(Exact(), images.roll(1, 0), ENTRIES, ENTRIES)
    assert not wrong.all()


def test_what_is_written_is_read_back(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    net = Retrieval(["red", "apple", "pizza"]).eval()
    net.load_state_dict({name: v.bfloat16().float() for name, v in net.state_dict().items()})
    net.save(tmp_path / "judge.safetensors")
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = net(images, ["red apple", "unknown pizza"])
        assert torch.equal(
            Retrieval.load(tmp_path / "judge.safetensors")(images, ["red apple", "unknown pizza"]),
            expected,
        )
        monkeypatch.setattr(judge_module, "JUDGE_FILE", tmp_path / "judge.safetensors")
        features = EmojiFeatures()
        made = features(features.preprocess((images + 1) / 2))
        assert torch.allclose(made, net.features(images), atol=1e-5)
    with pytest.raises(ValueError, match="expected colour images of 64 x 64 px"):
        features.preprocess(torch.zeros(1, 3, 32, 32))


def test_wide_captions_tell_a_group_and_never_a_name() -> None:
    pictures = torch.zeros(4, 40, 64, 64, 3, dtype=torch.uint8).numpy()
    captions, real = wide_set(Emoji(pictures, ENTRIES), 20, seed=0)
    assert real.shape == (20, 3, 64, 64)
    assert {text.removesuffix(" in noto style") for text in captions} == {"group", "subgroup"}


@pytest.mark.full
def test_the_ladder_compares_with_most_steps_and_a_perfect_sampler_is_near_the_floor(
    monkeypatch,
) -> None:
    """A sampler whose images are the real ones plus noise that fewer steps leave."""
    levels = np.random.default_rng(0).integers(0, 255, (4, 40, 1, 1, 3), np.uint8)
    pixels = np.broadcast_to(levels, (4, 40, 64, 64, 3)).copy()
    emoji = Emoji(pixels, ENTRIES)
    torch.manual_seed(0)
    net = Retrieval(["group"]).eval().requires_grad_(False)

    def made(_pipeline, captions, steps, guidance, seed):
        real = wide_set(emoji, len(captions), seed + 1)[1]
        return real + torch.randn(real.shape) / steps

    monkeypatch.setattr(ladder_module, "sample", made)
    rungs = [*ladder(None, emoji, net, (1.0,), count=100)]
    assert [rung.steps for rung in rungs] == [50, 25, 8, 4, 2, 1]
    assert rungs[0].ratio == 1
    assert rungs[-1].ratio > 2
    assert rungs[0].frechet == pytest.approx(floor(emoji, net, 100), rel=0.3)
