"""Judges samplers of digits: how close, how diverse, how right, how fast.

Each sampler makes as many images as there are held-out real ones, with the same class counts, once
per noise seed. Frechet distance AND recall decide; class accuracy alone does not, since a blur
that shows each class's mean is recognised perfectly.
"""

# N images

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from stepdistill.evaluation.frechet import frechet_distance
from stepdistill.evaluation.manifold import manifold_scores
from stepdistill.evaluation.samples import PipelineSampler, Samples
from stepdistill.reporting.pictures import ink
from stepdistill.reporting.values import Measured

from .classifier import DigitClassifier
from .data import DIGIT_NAMES, Digits, Split, stratified_subset

PREVIEWS_PER_CLASS = 2
NOISE_SEEDS = (0, 1, 2, 3, 4)
TEACHER_STEPS = (1, 2, 4, 8, 50)


Sampler = Callable[[Sequence[str], int], Samples]  # (prompts, noise seed) -> samples


@dataclass(frozen=True)
class Row:
    """One line of the report. group: "real", "teacher" or "student"; previews: PREVIEWS_PER_CLASS
    images (1, 8, 8) of each class, in class order, or (3, 64, 64) of as many prompts."""

    label: str
    group: str
    steps: int | None
    frechet: Measured
    frechet_pixels: Measured
    recall: Measured
    accuracy: Measured
    network_calls: float | None
    seconds_per_image: float | None
    previews: Tensor

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**self.figures(), "previews": self.previews.tolist()}

    def figures(self) -> dict[str, Any]:
        """As JSON holds them, without the previews."""
        return {name: value for name, value in asdict(self).items() if name != "previews"}

    def write_previews(self, folder: Path, name: str) -> list[Path]:
        """Each preview as a WebP file of that name and its number."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}-{index:02d}.webp" for index in range(len(self.previews))]
        for path, preview in zip(paths, self.previews.tolist(), strict=True):
            Image.fromarray(ink(preview)).save(path, "WEBP", quality=90)
        return paths

    @staticmethod
    def save_all(rows: Sequence[Row], path: Path) -> None:
        """Write rows to a JSON file. Previews in colour, which are only shown, lose a little."""
        plain = [
            row.plain() if row.previews.shape[1] == 1 else {**row.figures(), "previews": _webp(row)}
            for row in rows
        ]
        path.write_text(json.dumps(plain))

    @staticmethod
    def load_all(path: Path) -> list[Row]:
        """The rows that `save_all` wrote."""
        spreads = ("frechet", "frechet_pixels", "recall", "accuracy")
        return [
            Row(
                **{
                    **raw,
                    **{name: Measured(**raw[name]) for name in spreads},
                    "previews": _previews(raw["previews"]),
                }
            )
            for raw in json.loads(path.read_text())
        ]


def _webp(row: Row) -> str:
    """The previews, one below the other, as base64 of a WebP file."""
    buffer = io.BytesIO()
    pixels = np.concatenate([ink(preview) for preview in row.previews.tolist()])
    Image.fromarray(pixels).save(buffer, "WEBP", quality=80, method=6)
    return base64.b64encode(buffer.getvalue()).decode()


def _previews(stored: str | list[Any]) -> Tensor:
    """(N, C, H, H) in [-1, 1] of what `save_all` made of them."""
    if not isinstance(stored, str):
        return torch.tensor(stored)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(stored))).convert("RGB"))
    squares = torch.tensor(pixels).unflatten(0, (-1, pixels.shape[1]))
    return squares.permute(0, 3, 1, 2) / 127.5 - 1


class Judge:
    """Scores image sets against the held-out real digits."""

    def __init__(self, digits: Digits, classifier: DigitClassifier) -> None:
        self.digits = digits
        self.classifier = classifier
        self._features = classifier.features(digits.heldout.images)

    @property
    def prompts(self) -> list[str]:
        """The held-out images' prompts: what each sampler is asked for, in this order."""
        return self.digits.heldout.prompts

    def floor(self, seeds: Sequence[int] = NOISE_SEEDS) -> Row:
        """Real training images judged as if they were generated: what a perfect sampler scores."""
        like = self.digits.heldout.labels
        subsets = [stratified_subset(self.digits.train, like, seed) for seed in seeds]
        return self._row("real (train)", "real", None, subsets, None, None)

    def score(self, label: str, group: str, steps: int, samples: Sequence[Samples]) -> Row:
        """The row of one sampler. Args: samples, one per noise seed, made for `prompts`."""
        labels = self.digits.heldout.labels
        for made in samples:
            if made.images.shape != self.digits.heldout.images.shape:
                raise ValueError(
                    f"{label}: expected images of shape {tuple(self.digits.heldout.images.shape)}, "
                    f"got {tuple(made.images.shape)}. Sample one image for each of judge.prompts."
                )
        seconds = sum(made.seconds for made in samples) / (len(samples) * len(labels))
        splits = [Split(made.images, labels) for made in samples]
        return self._row(label, group, steps, splits, samples[0].network_calls, seconds)

    def run(
        self,
        label: str,
        group: str,
        steps: int,
        sampler: Sampler,
        seeds: Sequence[int] = NOISE_SEEDS,
    ) -> Row:
        """Samples once per noise seed, then scores."""
        return self.score(label, group, steps, [sampler(self.prompts, seed) for seed in seeds])

    def teacher_rows(self, folder: Path, seeds: Sequence[int] = NOISE_SEEDS) -> list[Row]:
        """The teacher's pipeline in `folder` at each of TEACHER_STEPS."""
        pipeline, rows = DiffusionPipeline.from_pretrained(str(folder)), []
        for steps in TEACHER_STEPS:
            call = {"num_inference_steps": steps, "guidance_scale": 1}
            rows.append(
                self.run("teacher", "teacher", steps, PipelineSampler(pipeline, call), seeds)
            )
        return rows

    def _row(
        self,
        label: str,
        group: str,
        steps: int | None,
        sets: Sequence[Split],
        network_calls: float | None,
        seconds_per_image: float | None,
    ) -> Row:
        features = [self.classifier.features(one.images) for one in sets]
        real_pixels = self.digits.heldout.images.flatten(1)
        return Row(
            label=label,
            group=group,
            steps=steps,
            frechet=Measured.of([frechet_distance(self._features, f) for f in features]),
            frechet_pixels=Measured.of(
                [frechet_distance(real_pixels, one.images.flatten(1)) for one in sets]
            ),
            recall=Measured.of([manifold_scores(self._features, f).recall for f in features]),
            accuracy=Measured.of(
                [self.classifier.accuracy(one.images, one.labels) for one in sets]
            ),
            network_calls=network_calls,
            seconds_per_image=seconds_per_image,
            previews=previews(sets[0]),
        )


def previews(split: Split) -> Tensor:
    """(K * PREVIEWS_PER_CLASS, 1, 8, 8): the first images of each class, in class order."""
    index = [
        (split.labels == label).nonzero().flatten()[:PREVIEWS_PER_CLASS]
        for label in range(len(DIGIT_NAMES))
    ]
    return split.images[torch.cat(index)]
