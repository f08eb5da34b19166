"""From features, scores and costs to named numbers, each with the network and reference it is of.

`frechet`, `kid`, `precision`, `recall`, `density`, `coverage`: against a reference set.
`diversity`: mean distance of two images of one prompt. Drifts: relative to the teacher's means.
Of videos, these are of frames; `motion` and `frame_distance` stand in videos.py.
"""

# N, M images, D feature width

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from stepdistill.reporting.values import Measured

from .frechet import frechet_distance, kernel_distance
from .manifold import manifold_scores

MANIFOLD_IMAGES = 10_000  # at most that many, the first ones: time grows with their square
DIVERSITY_IMAGES = 64  # of one prompt, the first ones: time and memory grow with their square


class Metric(NamedTuple):
    """How a metric is shown. kind: the table it stands in; higher: whether that is better, None
    where the teacher's value is the aim; form: of its numbers, times factor."""

    heading: str
    kind: str
    higher: bool | None = None
    form: str = ".3f"
    factor: float = 1


QUALITY, LOOK, OVER_TIME, COST = "quality", "look", "over time", "cost"
METRICS = {  # in the tables' order
    "frechet": Metric("Fréchet", QUALITY, False, ".2f"),
    "kid": Metric("KID", QUALITY, False, ".3g"),
    "precision": Metric("precision", QUALITY, True),
    "recall": Metric("recall", QUALITY, True),
    "density": Metric("density", QUALITY, True),
    "coverage": Metric("coverage", QUALITY, True),
    "score": Metric("score", QUALITY, True, ".4f"),
    "diversity": Metric("diversity", QUALITY, True),
    "saturation": Metric("saturation", LOOK),
    "contrast": Metric("contrast", LOOK),
    "saturation_drift": Metric("saturation drift %", LOOK, None, ".1f", 100),
    "contrast_drift": Metric("contrast drift %", LOOK, None, ".1f", 100),
    "motion": Metric("motion", OVER_TIME, None, ".4f"),
    "motion_drift": Metric("motion drift %", OVER_TIME, None, ".1f", 100),
    "frame_distance": Metric("frame distance", OVER_TIME, None, ".3g"),
    "seconds_per_image": Metric("s / image", COST, False, ".4f"),
    "seconds_per_video": Metric("s / video", COST, False),
    "network_calls": Metric("network calls", COST, False, ".1f"),
    "peak_memory_gib": Metric("peak GiB", COST, False, ".2f"),
}


@dataclass(frozen=True)
class Number:
    """One measured value. network: feature network or scorer; reference: "real" or "teacher"."""

    metric: str
    spread: Measured
    network: str = ""
    reference: str = ""


@dataclass(frozen=True)
class System:
    """One row of an evaluation. group: "real", "teacher" or "student"; previews: image files, of
    videos `frames` each."""

    label: str
    group: str
    steps: int | None
    numbers: Sequence[Number]
    num_images: int
    previews: Sequence[str] = field(default_factory=tuple)
    frames: int = 1

    def get(self, metric: str, network: str = "", reference: str = "") -> Measured | None:
        """The value of that name, of the first such network and reference where left out."""
        for number in self.numbers:
            of = network in ("", number.network) and reference in ("", number.reference)
            if number.metric == metric and of:
                return number.spread
        return None

    def plain(self) -> dict[str, object]:
        """As JSON holds it."""
        return asdict(self)


def set_distances(real: Tensor, generated: Tensor, k: int) -> dict[str, float]:
    """Every distance between two sets of features (N, D), (M, D); k: neighbours of the manifold."""
    values = {
        "frechet": frechet_distance(real, generated),
        "kid": kernel_distance(real, generated),
    }
    if min(len(real), len(generated)) > k:
        some = manifold_scores(real[:MANIFOLD_IMAGES], generated[:MANIFOLD_IMAGES], k)
        values |= asdict(some)
    return values


def diversity(features: Tensor, prompts: Sequence[Hashable]) -> float | None:
    """Mean Euclidean distance of two images of one prompt, then mean over prompts.

    Args: features (N, D); prompts: N, equal for images of one prompt.
    Notes: None where fewer than half of the prompts have two images: one image was drawn of each,
           and the few lines that a prompts file repeats say nothing about the rest. Of a prompt
           (or an unconditional model) the first DIVERSITY_IMAGES count.
    """
    rows: dict[Hashable, list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(index)
    several = [index[:DIVERSITY_IMAGES] for index in rows.values() if len(index) > 1]
    if not several or 2 * len(several) < len(rows):
        return None
    means = [torch.pdist(features[index].double()).mean() for index in several]
    return float(torch.stack(means).mean())


def drift(value: float, teacher: float) -> float | None:
    """Relative difference to the teacher's mean; None where that is zero (grey images)."""
    return value / teacher - 1 if teacher > 1e-6 else None


def seconds_per_image(batches: Sequence[tuple[int, float]]) -> float:
    """Median over batches (images, seconds); each process's first, which warms up, has seconds < 0.

    Where there are warm-ups alone, their own median.
    """
    steady = [seconds / count for count, seconds in batches if seconds >= 0]
    rates = steady or [-seconds / count for count, seconds in batches]
    return float(torch.tensor(rates, dtype=torch.float64).median())


def numbers_of(values: Sequence[Mapping[str, float | None]], **of: str) -> list[Number]:
    """Numbers of dictionaries, one for each noise seed; a value that any seed lacks is left out."""
    made = []
    for metric in values[0]:
        known = [value for one in values if (value := one[metric]) is not None]
        if len(known) == len(values):
            made.append(Number(metric, Measured.of(known), **of))
    return made
