"""Sample an exported pipeline with the steps and guidance it was trained for."""

from __future__ import annotations

from pydantic_settings import CliPositionalArg

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Export
from stepdistill.core.options import Count, Seed


class Options(CommandOptions):
    model_dir: CliPositionalArg[Export]
    """Exported pipeline folder."""
    prompt: list[str]
    """Prompts (or class labels), an image, a video or a sound each."""
    num_steps: Count | None = None
    """A step count of the trained grid."""
    seed: Seed = 0
    """Of the first image's noise; the next ones count on."""
    output_dir: str = "samples"
    """Folder of the images."""


def run(options: Options) -> None:
    from stepdistill.export.run import sample_export

    given = (options.model_dir, options.prompt, options.output_dir, options.num_steps, options.seed)
    for path in sample_export(*given):
        print(path)
