"""Draw a run's report.html again from its records."""

from __future__ import annotations

from pathlib import Path

from pydantic_settings import CliPositionalArg

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import RunFolder


class Options(CommandOptions):
    run_dir: CliPositionalArg[RunFolder]
    """output_dir of a finished or running training run."""


def run(options: Options) -> None:
    from stepdistill.monitoring.run_report import write_run_report
    from stepdistill.storage.files import write_text

    print(write_run_report(Path(options.run_dir), write_text))
