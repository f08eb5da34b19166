"""Distil a teacher of handwritten digits to 1 and 4 steps and write a report."""

from __future__ import annotations

from typing import Literal

from stepdistill.config.flags import CommandOptions


class Options(CommandOptions):
    method: str = "dmd2"
    """A method, or snoopi or tscd_one_lora."""
    student: Literal["lora", "full"] = "full"
    """How the student stores its weights."""
    seconds: float | None = None
    """Training budget of each student; none means its recipe's steps."""
    seed: int = 0
    """Of the students' training."""
    output_dir: str = "demo"
    """Folder of teacher, students and report."""


def run(options: Options) -> None:
    from stepdistill.demo.run import run_demo

    run_demo(**options.model_dump())
