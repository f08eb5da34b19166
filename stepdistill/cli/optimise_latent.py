"""Steer an export that makes sound by its first noise: inpaint, continue, shape (DITTO-2)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import CliPositionalArg

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Export, Here
from stepdistill.core.options import Count, Seed


class Options(CommandOptions):
    model_dir: CliPositionalArg[Export]
    """Exported pipeline folder."""
    prompt: str
    """What the sound is told."""
    target: Here | None = None
    """WAV file at the model's rate (16-bit PCM), of keep and continue_seconds."""
    keep: list[str] = Field(default_factory=list)
    """FROM:TO in seconds of the target that stay (inpainting); the rest is made anew."""
    continue_seconds: Annotated[float, Field(gt=0)] | None = None
    """The sound begins with so much of the target's end (outpainting)."""
    intensity: list[str] = Field(default_factory=list)
    """SECONDS:DB of loudness, straight lines between."""
    centroid: list[str] = Field(default_factory=list)
    """SECONDS:HZ of brightness (the spectrum's centre), likewise."""
    structure: str | None = None
    """Equal sections by letters, as ABA: the same letter sounds alike."""
    loss: str | None = None
    """FILE.py:FUNCTION of yours, (waves (B, channels, samples), rate) -> a loss. It is run."""
    weights: list[str] = Field(default_factory=list)
    """NAME:WEIGHT of a loss (keep, continue, intensity, centroid, structure, own); none means 1."""
    iterations: Count = 70
    """Of Adam."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.1
    """For noise of unit variance."""
    surrogate_steps: Count = 1
    """Student steps that are optimised through; the result takes the export's own."""
    stop_below: float | None = None
    """A loss that is good enough."""
    seed: Seed = 0
    """Of the first noise."""
    output_dir: str = "optimised"
    """Folder of before.wav, after.wav, optimised.json and report.html."""


def run(options: Options) -> None:
    from stepdistill.export.optimise import Steering, optimise_export

    given = options.model_dump()
    names = ("target", "keep", "continue_seconds", "intensity", "centroid", "structure", "loss")
    steering = Steering(**{name: given.pop(name) for name in (*names, "weights")})
    where = (given.pop("model_dir"), given.pop("prompt"), given.pop("output_dir"))
    print(optimise_export(*where, steering, **given) / "report.html")
