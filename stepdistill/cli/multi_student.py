"""Train several students, each on its share of the prompts, and export one routed pipeline.

The prompts (or class labels) of --data.prompts_file are split into --num_students equal shares, and
one LoRA student after another is trained on its own with the other options, those of `stepdistill
train`. The same command goes on after a stop. Of the exported pipeline each call computes one
student, picked by its prompt. Exit statuses: those of `stepdistill train`.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.config.files import parse_run_config
from stepdistill.config.run import RunConfig
from stepdistill.core.options import Count


class Options(RunConfig):
    first = ("num_students", *RunConfig.first)

    num_students: Count
    """How many students; one is the method as it stands."""


def parse(argv: Sequence[str], prog: str) -> Options:
    """A run's options and the number of students."""
    return parse_run_config(argv, prog, about=str(__doc__), model=Options, early=True, by_size=True)


def run(options: Options) -> None:
    from stepdistill.cli._multi_student import train_students

    given = options.model_dump(exclude={"num_students"})
    train_students(RunConfig(**given), options.num_students, options.reasons)
