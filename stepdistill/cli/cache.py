"""Encode a run's prompts and images to --cache_dir; the method does not matter."""

from __future__ import annotations

from collections.abc import Sequence

from stepdistill.config.files import parse_run_config
from stepdistill.config.run import RunConfig


def parse(argv: Sequence[str], prog: str) -> RunConfig:
    """A run's options."""
    return parse_run_config(argv, prog, method="dmd2", about=str(__doc__), early=True)


def run(options: RunConfig) -> None:
    from stepdistill.cache.precompute import cache_run
    from stepdistill.training.sources import open_dataset, open_gan_dataset

    gan = open_gan_dataset(options)
    cache_run(options, open_dataset(options), *([] if gan is None else [gan]))
