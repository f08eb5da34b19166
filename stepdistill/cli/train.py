"""Train from config files and flags, and export.

A recipe of several trainings runs them one after another in folders of OUTPUT_DIR; the same command
goes on after a stop. --max_train_steps is then of each, --max_train_seconds of all together.

Exit statuses: 0 finished; 1 a mistake, told in one line; 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C
and saved, start it again; 76 stopped by the watchdog, which names the last good checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.config.files import parse_run_config
from stepdistill.config.run import RunConfig
from stepdistill.config.trainings import SeveralTrainings, parse_trainings


def parse(argv: Sequence[str], prog: str) -> RunConfig | SeveralTrainings:
    """A run's options, or those of a recipe's trainings."""
    return parse_trainings(argv, prog) or parse_run_config(
        argv, prog, about=str(__doc__), early=True, by_size=True
    )


def run(options: RunConfig | SeveralTrainings) -> None:
    from stepdistill.demo.scorer import register_scorers
    from stepdistill.trainers import train_run

    register_scorers()  # of the demo's digits, which its recipes name
    if isinstance(options, RunConfig):
        train_run(options)
        return
    from stepdistill.cli._trainings import train_recipe

    train_recipe(options)
