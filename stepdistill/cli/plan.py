"""Forecast a run's memory and hours from configurations alone; status 1 where it won't fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from stepdistill.config.files import parse_run_config
from stepdistill.config.places import Place
from stepdistill.config.planned import require_known
from stepdistill.config.run import RunConfig


class Options(RunConfig):
    first = (*RunConfig.first, "num_gpus", "gpu", "memory_gb")

    pretrained_model_name_or_path: Annotated[str, Place(require_known)]
    """Teacher pipeline: a folder, of which weights may be absent, or a model's name."""
    num_gpus: int = Field(default=1, ge=1)
    """Processes that share the run, one a GPU."""
    gpu: str = "rtx4090"
    """Which one: its memory and its peak rate."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Memory of one GPU in GB; none means all of `gpu`'s."""


def parse(argv: Sequence[str], prog: str) -> Options:
    """A run's options and the machine's."""
    return parse_run_config(argv, prog, about=str(__doc__), model=Options, early=True)


def run(options: Options) -> int:
    from stepdistill.planning.report import print_plan

    machine = (options.num_gpus, options.gpu, options.memory_gb)
    return 0 if print_plan(options, *machine) else 1
