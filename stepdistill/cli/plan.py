"""Forecast a run's memory and hours from configurations alone; status 1 where it won't fit."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from stepdistill.config.files import parse_run_config
from stepdistill.config.run import RunConfig


class Options(RunConfig):
    first = (*RunConfig.first, "num_gpus", "gpu", "memory_gb")

    num_gpus: int = Field(default=1, ge=1)
    """Processes that share the run, one a GPU."""
    gpu: str = "rtx4090"
    """Which one: its memory and its peak rate."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory of one GPU in GB; none means all of `gpu`'s."""


def parse(argv: Sequence[str], prog: str) -> Options:
    """A run's options and the machine's."""
    return parse_run_config(argv, prog, about=str(__doc__), model=Options)


def run(options: Options) -> int:
    from stepdistill.planning.report import print_plan

    machine = (options.num_gpus, options.gpu, options.memory_gb)
    return 0 if print_plan(options, *machine) else 1
