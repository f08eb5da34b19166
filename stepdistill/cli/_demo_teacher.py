"""What `compare` hands over where no teacher is given: a demo's teacher, data and judge, and the
methods' recipes for demos."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from stepdistill.comparison.students import StepsServed, Student, served_by_recipes
from stepdistill.comparison.teacher_setup import TEACHER_ROWS, Plain, TeacherSetup
from stepdistill.config.recipes import Training, recipe_name, recipes
from stepdistill.data.images import ImageFolderDataset
from stepdistill.data.stream import PromptDataset
from stepdistill.demo.metrics import Row
from stepdistill.demo.subject import Digits, RowJudge, Subject
from stepdistill.demo.teacher import quiet_loading
from stepdistill.evaluation.learned import train_features
from stepdistill.evaluation.samples import PipelineSampler
from stepdistill.export.pipeline import RECORD
from stepdistill.pairs.dataset import PairDataset
from stepdistill.pairs.teacher import make_pairs

PAIRS, PAIR_STEPS = 4096, 16


class DemoTeacher(TeacherSetup):
    """Teacher, data and pairs are made below `out`, once.

    Args: subject: whose teacher; noise_seeds: that each student is judged from, none means the
        subject's.
    """

    def __init__(
        self, out: Path, subject: Subject, pairs: int = PAIRS, noise_seeds: int | None = None
    ) -> None:
        super().__init__(out)
        self.subject, self.pairs = subject, pairs
        self.seeds = subject.seeds if noise_seeds is None else range(noise_seeds)
        quiet_loading()

    def teacher(self) -> str:
        return str(self.out / "teacher")

    def check(self, chosen: Sequence[Student]) -> None:
        """Nothing that was said can be wrong yet: its numbers are checked where they are used."""

    def prepare(self, needs_pairs: bool) -> None:
        torch.set_num_threads(1)
        out = self.out
        teacher = self.subject.teacher(out / "teacher", None)
        prompts = self.subject.write_data(out / "data")

        def pairs() -> None:
            make_pairs(str(teacher.folder), prompts, out / "pairs", num_pairs=self.pairs,
                       num_steps=PAIR_STEPS, batch_size=256)  # fmt: skip

        if needs_pairs:
            self.pairs_made(pairs, time.process_time)
        if not (out / TEACHER_ROWS).is_file():
            rows = [
                self._judge.floor(self.seeds),
                *self._judge.teacher_rows(teacher.folder, self.seeds),
            ]
            plain = [self._plain(row, f"{row.label}_{row.steps}") for row in rows]
            (out / TEACHER_ROWS).write_text(json.dumps(plain))

    def steps_served(self, methods: Sequence[str]) -> dict[str, StepsServed]:
        served = served_by_recipes()
        try:
            names = dict.fromkeys(recipe_name(name) for name in methods or served)
        except ValueError as err:
            raise ValueError(f"methods: {err}") from err
        return {name: served[name] for name in names}

    def trainings(self, student: Student) -> list[Training]:
        made = recipes()[student.recipe].with_first(lambda first: self.subject.first(first, None))
        return made.trainings(student.trained_for)

    def equipped(self, training: Training) -> Training:
        """See `equipped`."""
        return equipped(training, self.subject, self.out)

    def dataset(self, training: Training) -> PromptDataset | ImageFolderDataset | PairDataset:
        if training.data == "prompts":
            return PromptDataset.from_file(self.out / "data" / "prompts.txt")
        if training.data == "images":
            return ImageFolderDataset(self.out / "data", None, labels=False)
        return PairDataset(self.out / "pairs")

    def judge(self, label: str, steps: int, folder: Path) -> Plain:
        call = json.loads((folder / RECORD).read_text())["call"]
        options = {"num_inference_steps": steps, "guidance_scale": 1, **call}
        sampler = PipelineSampler(DiffusionPipeline.from_pretrained(str(folder)), options)
        made = [sampler.in_parts(self._judge.prompts, seed) for seed in self.seeds]
        row = self._judge.score(label, "student", steps, made)
        return self._plain(row, f"{folder.parent.name}_{steps}")

    @functools.cached_property
    def _judge(self) -> RowJudge:
        return self.subject.judge()

    def _plain(self, row: Row, name: str) -> Plain:
        """As JSON holds it; pictures in colour are files of that name."""
        if row.previews.shape[1] == 1:
            return {**row.plain(), "noise_seeds": len(self.seeds)}
        previews = row.write_previews(self.out / "previews", name)
        shown = [str(path.relative_to(self.out)) for path in previews]
        return {**row.figures(), "previews": shown, "noise_seeds": len(self.seeds)}


def equipped(training: Training, subject: Subject, out: Path) -> Training:
    """With the subject's scorers, and with a pixel network of the training images, another than the
    judge's, where its heads read one that nobody named."""
    training = training.with_judges(dict(zip(Digits.scorers, subject.scorers, strict=True)))
    if not training.lacks_network:
        return training
    return training.with_network(train_features(out / "data", out / "features"))
