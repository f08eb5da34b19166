"""Export a checkpoint of a run as a pipeline or a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic_settings import CliPositionalArg

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Model, RunFolder
from stepdistill.core.options import Count


class Options(CommandOptions):
    run_dir: CliPositionalArg[RunFolder]
    """output_dir of a training run."""
    out_dir: CliPositionalArg[str]
    """Folder to write."""
    checkpoint: str | None = None
    """best, or checkpoint-N; none means the newest."""
    num_steps: Count | None = None
    """A step count of the trained grid."""
    format: Literal["pipeline", "lora", "diffusers", "kohya", "comfyui"] = "pipeline"
    """A whole pipeline or an adapter; diffusers is lora by another name."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Of a LoRA file; none means bfloat16."""
    high_student: Model | None = None
    """Of a low-noise expert's run: the pipeline export of the high-noise one's, to make a pipeline
    of both; none means that whose states it was trained on."""


def run(options: Options) -> None:
    from stepdistill.storage.folders import refuse_foreign
    from stepdistill.trainers import trainer_of_run

    refuse_foreign(Path(options.out_dir), "out_dir")
    trainer = trainer_of_run(options.run_dir, options.checkpoint)
    how = (options.num_steps, options.format, options.dtype, options.high_student)
    print(trainer.export(options.out_dir, *how))
