"""How a sampler of emoji does: wide captions by Frechet distance and recall, narrow ones by the
judge. The ladder of the teacher says whether there is anything to distil.
"""

# N images

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from stepdistill.evaluation.frechet import frechet_distance
from stepdistill.evaluation.manifold import manifold_scores
from stepdistill.evaluation.samples import PipelineSampler, Samples

from .captions import TELL_STYLE, TELL_TONE, caption
from .data import Emoji, held_out_keys
from .judge import Retrieval, real_score, right_caption_first

LADDER_STEPS = (1, 2, 4, 8, 25, 50)
_ROWS = 100  # images sampled at a time


@dataclass(frozen=True)
class Rung:
    """A number of steps and guidance on wide captions. ratio: its Frechet distance over that of
    most steps at the same guidance."""

    steps: int
    guidance: float
    frechet: float
    recall: float
    ratio: float


@dataclass(frozen=True)
class Obeyed:
    """Share of narrow captions whose picture the judge gives its right caption, of combinations
    seen in training and of held-out ones."""

    seen: float
    held_out: float


def wide_set(emoji: Emoji, count: int, seed: int) -> tuple[list[str], Tensor]:
    """Captions of groups and subgroups, with a real picture of each, (N, 3, 64, 64) in [-1, 1]."""
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    index = torch.multinomial(emoji.weights(), count, replacement=True, generator=generator)
    variant = torch.randint(len(emoji.pictures), (count,), generator=generator)
    captions = []
    for k in index.tolist():
        width = draw.choice(("group", "subgroup"))
        tone, style = draw.random() < TELL_TONE[width], draw.random() < TELL_STYLE
        captions.append(caption(emoji.entries[k], width, tone, style))
    return captions, emoji.images(variant, index)


def ladder(
    pipeline: StableDiffusionPipeline,
    emoji: Emoji,
    net: Retrieval,
    guidances: Sequence[float] = (1.0, 3.0),
    count: int = 500,
    seed: int = 0,
) -> Iterator[Rung]:
    """A rung for each of LADDER_STEPS and each guidance, most steps first."""
    captions, real = wide_set(emoji, count, seed)
    real_features = image_features(net, real)
    for guidance in guidances:
        best = None
        for steps in sorted(LADDER_STEPS, reverse=True):
            images = sample(pipeline, captions, steps, guidance, seed)
            features = image_features(net, images)
            distance = frechet_distance(real_features, features)
            best = distance if best is None else best
            recall = manifold_scores(real_features, features).recall
            yield Rung(steps, guidance, distance, recall, distance / best)


def floor(emoji: Emoji, net: Retrieval, count: int = 500, seed: int = 0) -> float:
    """Frechet distance of two draws of real pictures: what a perfect sampler scores."""
    one, other = (image_features(net, wide_set(emoji, count, seed + k)[1]) for k in (0, 1))
    return frechet_distance(one, other)


def obeys(
    pipeline: StableDiffusionPipeline,
    emoji: Emoji,
    net: Retrieval,
    steps: int = 50,
    guidance: float = 3.0,
    count: int = 500,
    seed: int = 0,
) -> Obeyed:
    """Narrow captions, `count` of seen combinations and every held-out one."""
    held_out = held_out_keys()
    seen = [entry for entry in emoji.entries if entry.key not in held_out]
    unseen = [entry for entry in emoji.entries if entry.key in held_out]
    shares = []
    for shown in (random.Random(seed).sample(seen, min(count, len(seen))), unseen):
        images = sample(pipeline, [*map(caption, shown)], steps, guidance, seed)
        right = right_caption_first(net, images, shown, emoji.entries, seed)
        shares.append(float(right.double().mean()))
    return Obeyed(*shares)


def measure(
    pipeline: StableDiffusionPipeline, emoji: Emoji, net: Retrieval, count: int = 500
) -> dict[str, Any]:
    """All of this file about a teacher, as JSON holds it: ladder, floor, obeyed, real."""
    return {
        "ladder": [asdict(rung) for rung in ladder(pipeline, emoji, net, count=count)],
        "floor": floor(emoji, net, count),
        "obeyed": asdict(obeys(pipeline, emoji, net, count=count)),
        "real": real_score(net, emoji, count),
    }


def sample(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """(N, 3, 64, 64) in [-1, 1]: the images of `draw_samples`."""
    return draw_samples(pipeline, captions, steps, guidance, seed).images


def draw_samples(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    steps: int,
    guidance: float,
    seed: int,
) -> Samples:
    """One image for each caption; the noise is the seed's at any number of steps."""
    sampler = PipelineSampler(pipeline, {"num_inference_steps": steps, "guidance_scale": guidance})
    return sampler.in_parts(captions, seed, _ROWS)


@torch.no_grad()
def image_features(net: Retrieval, images: Tensor) -> Tensor:
    """(N, D) features of the judge."""
    return torch.cat([net.features(part) for part in images.split(_ROWS)])
