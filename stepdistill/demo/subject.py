"""What the demo can be about: its teacher, its data and how its samplers are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from stepdistill.core.recipe import First
from stepdistill.evaluation.samples import Samples

from .classifier import train_classifier
from .data import load_digit_splits, write_data
from .metrics import NOISE_SEEDS, Judge, Row
from .scorer import DigitScorer, HeldOutDigitScorer
from .teacher import Teacher, TeacherConfig, load_or_train_teacher
from .verdict import Check, quality_checks


class RowJudge(Protocol):
    """Makes the report's rows. prompts: what every sampler is asked for, in this order."""

    @property
    def prompts(self) -> list[str]: ...

    def floor(self, seeds: Sequence[int]) -> Row:
        """Real images judged as if they were generated."""
        ...

    def score(self, label: str, group: str, steps: int, samples: Sequence[Samples]) -> Row:
        """The row of one sampler. Args: samples, one per noise seed, made for `prompts`."""
        ...

    def teacher_rows(self, folder: Path, seeds: Sequence[int]) -> list[Row]:
        """The teacher at a ladder of steps."""
        ...


class Subject(Protocol):
    """name: as --data says it. title: of the report. prompt: for its code to copy. pictures: what
    a row's pictures show. note: a line below them. data: where the pictures are from. seeds: of
    the noise, in judging. seconds: of a student's training, where none are asked; None: the
    recipe's steps. num_pairs: of noise and image, where a recipe learns from them. aim_seconds: of
    the whole demo on two cores, with the teacher there and with its training. right: see Report.
    scorers: kinds of its two small judges, for rewards to train with and to keep out."""

    name: str
    title: str
    prompt: str
    pictures: str
    note: str
    data: str
    seeds: Sequence[int]
    seconds: float | None
    num_pairs: int
    aim_seconds: tuple[float, float]
    right: tuple[str, str]
    scorers: tuple[str, str]

    def teacher(self, folder: Path, seconds: float | None) -> Teacher:
        """The teacher in `folder`, put there where it is not yet. Args: seconds: of a student."""
        ...

    def write_data(self, folder: Path) -> Path:
        """Pictures with their captions, and prompts.txt, whose path it returns."""
        ...

    def first(self, first: First, seconds: float | None) -> First:
        """A recipe's first training as it suits this teacher in so much time."""
        ...

    def judge(self) -> RowJudge: ...

    def more_time(self, rows: Sequence[Row], method: str, student: str) -> list[tuple[str, str]]:
        """The report's facts about what longer training gives. Args: rows: the report's. student:
        its layout."""
        ...

    def checks(self, rows: Sequence[Row]) -> list[Check]:
        """The bar that students should reach."""
        ...


class Digits:
    """Handwritten digits of 8 x 8 px; the teacher is trained here, in minutes.

    Args: teacher_steps: of a shorter training than that.
    """

    name = "digits"
    title = "Handwritten digits"
    prompt = "a handwritten seven"
    pictures = "digits zero to nine"
    note = (
        "Each row from the same noise and the same prompts, “a handwritten zero” to “a handwritten "
        "nine”. The first row is real: training images."
    )
    data = "scikit-learn load_digits: 1,797 real 8 x 8 images, stratified 70 / 30 split"
    seeds: Sequence[int] = NOISE_SEEDS
    seconds: float | None = None
    num_pairs = 4096
    aim_seconds = (180.0, 360.0)
    right = ("class accuracy", "class")
    scorers = (DigitScorer.kind, HeldOutDigitScorer.kind)

    def __init__(self, teacher_steps: int | None = None) -> None:
        self.digits, self.teacher_steps = load_digit_splits(), teacher_steps

    def teacher(self, folder: Path, seconds: float | None) -> Teacher:
        """See Subject; a student's short budget also shortens the teacher's, to five times it."""
        config = TeacherConfig(max_train_seconds=None if seconds is None else 5 * seconds)
        if self.teacher_steps is not None:
            config = replace(config, max_train_steps=self.teacher_steps)
        return load_or_train_teacher(config, self.digits.train, folder)

    def write_data(self, folder: Path) -> Path:
        """See Subject."""
        return write_data(self.digits.train, folder)

    def first(self, first: First, seconds: float | None) -> First:
        """See Subject."""
        return first

    def judge(self) -> Judge:
        """See Subject."""
        return Judge(self.digits, train_classifier(self.digits.train))

    def more_time(self, rows: Sequence[Row], method: str, student: str) -> list[tuple[str, str]]:
        """See Subject; their recipes' steps are all that they need."""
        return []

    def checks(self, rows: Sequence[Row]) -> list[Check]:
        """See Subject."""
        return quality_checks(rows)
