"""Held-out combinations as the teacher draws them, beside the nearest pictures that it learned
from: has it put something together, or found something again?"""

# N samples

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F

from stepdistill.reporting.blocks import Strip
from stepdistill.reporting.pictures import ink
from stepdistill.reporting.plots import save_page
from stepdistill.reporting.values import counted

from .captions import caption
from .data import Emoji, held_out_keys
from .judge import Retrieval
from .ladder import draw_samples, image_features

TITLE = "Combinations that training never saw"


def save_beside_nearest(
    path: Path,
    pipeline: StableDiffusionPipeline,
    emoji: Emoji,
    net: Retrieval,
    count: int = 16,
    steps: int = 50,
    guidance: float = 3.0,
    seed: int = 0,
) -> None:
    """Write a PNG of `count` held-out combinations: samples of their captions, the training
    pictures nearest to these in the judge's features, and the pictures that were held out.
    Nothing is written where `emoji` holds none of them."""
    held_out = held_out_keys()
    unseen = [k for k, entry in enumerate(emoji.entries) if entry.key in held_out]
    if not unseen:
        return
    shown = sorted(random.Random(seed).sample(unseen, min(count, len(unseen))))
    captions = [caption(emoji.entries[k]) for k in shown]
    samples = draw_samples(pipeline, captions, steps, guidance, seed).images
    near = nearest_trained(samples, emoji, net)
    rows = {
        ("teacher", f"teacher, {counted(steps, 'step')}", f"guidance {guidance:g}"): samples,
        ("real", "nearest it learned", "in the judge's features"): _pictures(emoji, near),
        ("real", "held out", "never trained on"): _pictures(emoji, torch.tensor(shown)),
    }
    save_page(path, TITLE, [Strip(*who, [[*map(ink, images)]]) for who, images in rows.items()], [])


def nearest_trained(images: Tensor, emoji: Emoji, net: Retrieval) -> Tensor:
    """(N,) numbers of the training pictures most like `images` (N, 3, 64, 64), held-out ones left
    out, by the cosine of the judge's features."""
    trained = emoji.weights().nonzero()[:, 0]
    known = F.normalize(image_features(net, _pictures(emoji, trained)))
    return trained[(F.normalize(image_features(net, images)) @ known.T).argmax(1)]


def _pictures(emoji: Emoji, index: Tensor) -> Tensor:
    return emoji.images(torch.zeros_like(index), index)
