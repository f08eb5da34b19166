"""Distil a teacher of handwritten digits to 1 and 4 steps and write a report."""

from __future__ import annotations

from typing import Literal

from stepdistill.config.flags import CommandOptions
from stepdistill.core.options import Positive, Seed


class Options(CommandOptions):
    method: str = "dmd2"
    """A method, or snoopi or tscd_one_lora."""
    student: Literal["lora", "full"] = "full"
    """How the student stores its weights."""
    seconds: Positive | None = None
    """Training budget of each student; none means its recipe's steps."""
    seed: Seed = 0
    """Of the students' training."""
    output_dir: str = "demo"
    """Folder of teacher, students and report."""


def run(options: Options) -> None:
    from stepdistill.cli._demo import run_demo

    run_demo(**options.model_dump())
