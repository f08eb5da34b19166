"""The demo's aims for its students, decided from the report's own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .metrics import Row

MIN_RECALL = 0.80
FOUR_STEP_RATIO = 1.3
ONE_STEP_AIM = 1.2


@dataclass(frozen=True)
class Check:
    """One aim. A short run that misses it has not failed."""

    claim: str
    measured: str
    passed: bool

    @property
    def kind(self) -> str:
        """Its colour: good or open."""
        return "good" if self.passed else "open"

    @property
    def word(self) -> str:
        """The verdict in one word or two."""
        return "reached" if self.passed else "not reached"


def find_row(rows: Sequence[Row], group: str, steps: int) -> Row | None:
    """The first row of that group and number of steps, if there is one."""
    return next((row for row in rows if row.group == group and row.steps == steps), None)


def quality_checks(rows: Sequence[Row]) -> list[Check]:
    """The aims of Frechet distance and recall, for the students that the rows hold."""
    teacher8, teacher50 = find_row(rows, "teacher", 8), find_row(rows, "teacher", 50)
    student1, student4 = find_row(rows, "student", 1), find_row(rows, "student", 4)
    checks = []
    if student1 and teacher8:
        claim = "1-step student: at most the teacher's at 8 steps"
        checks.append(_at_most(claim, student1.frechet.mean, teacher8.frechet.mean))
    if student1:
        recall = student1.recall.mean
        claim = f"1-step student: recall at least {MIN_RECALL:.2f}"
        checks.append(Check(claim, f"{recall:.3f}", recall >= MIN_RECALL))
    if student4 and teacher50:
        claim = f"4-step student: at most {FOUR_STEP_RATIO} × the teacher's at 50 steps"
        checks.append(ratio_check(claim, student4, teacher50, FOUR_STEP_RATIO))
    if student1 and teacher50:
        claim = f"1-step student at most {ONE_STEP_AIM} × the teacher's at 50 steps"
        checks.append(ratio_check(claim, student1, teacher50, ONE_STEP_AIM))
    return checks


def time_check(seconds: float, limit: float, teacher_cached: bool) -> Check:
    """The aim of the whole demo's wall clock, on two CPU cores."""
    state = "with the teacher cached" if teacher_cached else "with the teacher's training"
    claim = f"Whole demo {state}: at most {limit / 60:.0f} minutes"
    return Check(claim, f"{seconds:.0f} s", seconds <= limit)


def _at_most(claim: str, value: float, limit: float) -> Check:
    return Check(claim, f"{value:.2f} against {limit:.2f}", value <= limit)


def ratio_check(claim: str, student: Row, teacher: Row, limit: float) -> Check:
    """The aim of a student's Frechet distance over a teacher's."""
    ratio = student.frechet.mean / teacher.frechet.mean
    return Check(claim, f"{ratio:.2f} ×", ratio <= limit)
