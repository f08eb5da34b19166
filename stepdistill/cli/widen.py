"""Make a Stable Diffusion that reads an image too: eight input channels, four of them zero.

    stepdistill widen --model DIR --output_dir sd15-image

What super-resolution or editing begins with: train --method scale_distill --method_config.target
images, or any method on images to edit.
"""

from __future__ import annotations

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Model


class Options(CommandOptions):
    model: Model
    """Pipeline folder or Hub id of a StableDiffusionPipeline."""
    output_dir: str
    """The pipeline folder to write, of StableDiffusionInstructPix2PixPipeline."""


def run(options: Options) -> None:
    from stepdistill.export.widen import widen_pipeline

    print(f"wrote {widen_pipeline(options.model, options.output_dir)}")
