"""What `compare` hands over where no teacher is given: the demo's handwritten digits, the methods'
recipes for them, and held-out digits to judge by."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepdistill.comparison.students import StepsServed, Student, served_by_recipes
from stepdistill.comparison.teacher_setup import TEACHER_ROWS, Plain, TeacherSetup
from stepdistill.config.recipes import Training, recipe_name, recipes
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.stream import PromptDataset
from stepdistill.demo.classifier import train_classifier
from stepdistill.demo.data import load_digit_splits, write_data
from stepdistill.demo.metrics import NOISE_SEEDS, Judge, Row
from stepdistill.demo.teacher import TeacherConfig, load_or_train_teacher, quiet_loading
from stepdistill.evaluation.learned import train_features
from stepdistill.evaluation.samples import PipelineSampler
from stepdistill.export.pipeline import RECORD
from stepdistill.pairs.dataset import PairDataset
from stepdistill.pairs.teacher import make_pairs

PAIRS, PAIR_STEPS = 4096, 16


class Digits(TeacherSetup):
    """Teacher, data and pairs are made below `out`, once.

    Args: teacher_steps: a shorter training of the teacher than the demo's; noise_seeds: that each
        student is judged from.
    """

    def __init__(
        self,
        out: Path,
        teacher_steps: int | None = None,
        pairs: int = PAIRS,
        noise_seeds: int = len(NOISE_SEEDS),
    ) -> None:
        super().__init__(out)
        config = TeacherConfig()
        self.config = replace(config, max_train_steps=teacher_steps or config.max_train_steps)
        self.pairs, self.seeds = pairs, range(noise_seeds)
        quiet_loading()

    def teacher(self) -> str:
        return str(self.out / "teacher")

    def check(self, chosen: Sequence[Student]) -> None:
        """Nothing that was said can be wrong yet: its numbers are checked where they are used."""

    def prepare(self, needs_pairs: bool) -> None:
        torch.set_num_threads(1)
        digits, out = load_digit_splits(), self.out
        teacher = load_or_train_teacher(self.config, digits.train, out / "teacher")
        prompts = write_data(digits.train, out / "data")

        def pairs() -> None:
            make_pairs(str(teacher.folder), prompts, out / "pairs", num_pairs=self.pairs,
                       num_steps=PAIR_STEPS, batch_size=256)  # fmt: skip

        if needs_pairs:
            self.pairs_made(pairs, time.process_time)
        if not (out / TEACHER_ROWS).is_file():
            rows = [
                _judge().floor(self.seeds),
                *_judge().teacher_rows(teacher.folder, self.seeds),
            ]
            Row.save_all(rows, out / TEACHER_ROWS)

    def steps_served(self, methods: Sequence[str]) -> dict[str, StepsServed]:
        served = served_by_recipes()
        try:
            names = dict.fromkeys(recipe_name(name) for name in methods or served)
        except ValueError as err:
            raise ValueError(f"methods: {err}") from err
        return {name: served[name] for name in names}

    def trainings(self, student: Student) -> list[Training]:
        return recipes()[student.recipe].trainings(student.trained_for)

    def equipped(self, training: Training) -> Training:
        """See `equipped`."""
        return equipped(training, self.out)

    def dataset(self, training: Training) -> Any:
        if training.data == "prompts":
            return PromptDataset.from_file(self.out / "data" / "prompts.txt")
        if training.data == "images":
            return ImageFolderDataset(self.out / "data", None, labels=False)
        return PairDataset(self.out / "pairs")

    def judge(self, label: str, steps: int, folder: Path) -> Plain:
        call = json.loads((folder / RECORD).read_text())["call"]
        options = {"num_inference_steps": steps, "guidance_scale": 1, **call}
        sampler = PipelineSampler(DiffusionPipeline.from_pretrained(str(folder)), options)
        row = _judge().run(label, "student", steps, sampler, self.seeds)
        return {**row.plain(), "noise_seeds": len(self.seeds)}


@functools.cache
def _judge() -> Judge:
    digits = load_digit_splits()
    return Judge(digits, train_classifier(digits.train))


def equipped(training: Training, out: Path) -> Training:
    """With a pixel network of the training images, another than the judge's, where its heads read
    one that nobody named."""
    if not training.lacks_network:
        return training
    return training.with_network(train_features(out / "data", out / "features"))
