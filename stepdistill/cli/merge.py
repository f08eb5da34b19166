"""Merge LoRA files with weights, or average two exported pipelines."""

from __future__ import annotations

from typing import Literal

from pydantic_settings import CliPositionalArg

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Lora


class Options(CommandOptions):
    sources: CliPositionalArg[list[Lora]]
    """path[:weight] of LoRA files or of two pipelines."""
    output: str
    """Folder to write."""
    method: Literal["cat", "linear"] | None = None
    """Of LoRA files; none means cat, the sum."""


def run(options: Options) -> None:
    from stepdistill.export.merge import merge_sources

    print(merge_sources(options.sources, options.output, options.method))
