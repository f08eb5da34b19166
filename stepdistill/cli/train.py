"""Train from config files and flags, and export.

Exit statuses: 0 finished; 1 a mistake, told in one line; 75 stopped by SIGTERM, SIGUSR1 or Ctrl-C
and saved, start it again; 76 stopped by the watchdog, which names the last good checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.config.files import parse_run_config
from stepdistill.config.run import RunConfig


def parse(argv: Sequence[str], prog: str) -> RunConfig:
    """A run's options."""
    return parse_run_config(argv, prog, about=str(__doc__), early=True, by_size=True)


def run(options: RunConfig) -> None:
    from stepdistill.demo.scorer import register_scorers
    from stepdistill.trainers import train_run

    register_scorers()  # of the demo's digits, which its recipes name
    train_run(options)
