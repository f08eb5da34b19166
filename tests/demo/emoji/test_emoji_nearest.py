"""Held-out combinations beside what training saw that is most like them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from stepdistill.demo.emoji import nearest as nearest_module
from stepdistill.demo.emoji.captions import Entry, caption
from stepdistill.demo.emoji.data import Emoji
from stepdistill.demo.emoji.judge import Retrieval
from stepdistill.demo.emoji.nearest import nearest_trained, save_beside_nearest
from stepdistill.evaluation.samples import Samples

ENTRIES = [Entry(str(k), f"thing{k}", "group", "subgroup", None, "noto") for k in range(5)]
HELD_OUT = frozenset({ENTRIES[1].key, ENTRIES[4].key})


def _set_up(monkeypatch):
    monkeypatch.setattr("stepdistill.demo.emoji.data.held_out_keys", lambda: HELD_OUT)
    monkeypatch.setattr(nearest_module, "held_out_keys", lambda: HELD_OUT)
    pictures = np.random.default_rng(0).integers(0, 255, (1, 5, 64, 64, 3), np.uint8)
    torch.manual_seed(0)
    return Emoji(pictures, ENTRIES), Retrieval(["thing1"]).eval().requires_grad_(False)


def test_a_trained_picture_is_nearest_to_itself_and_a_held_out_one_is_never_found(
    monkeypatch,
) -> None:
    emoji, net = _set_up(monkeypatch)
    index = torch.arange(5)
    found = nearest_trained(emoji.images(torch.zeros_like(index), index), emoji, net)
    assert found[[0, 2, 3]].tolist() == [0, 2, 3]
    assert set(found[[1, 4]].tolist()) <= {0, 2, 3}


def test_the_picture_shows_each_held_out_caption_once_drawn(tmp_path, monkeypatch) -> None:
    emoji, net = _set_up(monkeypatch)
    asked = []

    def draw(_pipeline, captions, steps, guidance, seed):
        asked.append((captions, steps, guidance, seed))
        return Samples(torch.zeros(len(captions), 3, 64, 64), 0.0, 1.0)

    monkeypatch.setattr(nearest_module, "draw_samples", draw)
    save_beside_nearest(tmp_path / "held_out.png", None, emoji, net, steps=7, guidance=2.0, seed=3)
    assert asked == [([caption(ENTRIES[1]), caption(ENTRIES[4])], 7, 2.0, 3)]
    with Image.open(tmp_path / "held_out.png") as picture:
        assert picture.width > 1000
    none = Emoji(emoji.pictures[:, :1], ENTRIES[:1])
    save_beside_nearest(tmp_path / "none.png", None, none, net)
    assert not (tmp_path / "none.png").exists()
