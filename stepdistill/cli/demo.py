"""Distil a small text-to-image teacher to 1 and 4 steps and write a report.

`stepdistill demo teacher` makes the teacher of emoji from its source packages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from stepdistill.config.flags import CommandOptions, parse_options
from stepdistill.core.options import Count, Positive, Seed
from stepdistill.demo.emoji.budget import Budget


class Options(CommandOptions):
    data: Literal["emoji", "digits"] = "emoji"
    """What the teacher draws: emoji of 64 x 64 px, or grey digits of 8 x 8 px, a fast test bed."""
    teacher: str | None = None
    """Folder of the emoji teacher, as `stepdistill demo teacher` makes it; none means the shipped
    one."""
    method: str = "dmd2"
    """A method, or snoopi or tscd_one_lora."""
    student: Literal["lora", "full"] = "full"
    """How the student stores its weights."""
    seconds: Positive | None = None
    """Training budget of each student; none means its recipe's steps, and 110 with emoji."""
    seed: Seed = 0
    """Of the students' training."""
    output_dir: str = "demo"
    """Folder of teacher, students and report."""


class TeacherOptions(CommandOptions):
    source: str
    """Folder of the packages that `npm pack` gets: @lobehub/fluent-emoji-3d,
    emoji-datasource-google and emoji-datasource."""
    output_dir: str
    """Folder of data, checkpoints and, once it is done, the teacher."""
    seconds: Positive | None = None
    """How long this call may work; the next goes on from there. None means until it is done."""
    autoencoder_pictures: Count = Budget.autoencoder
    """Pictures that the autoencoder sees."""
    denoiser_pictures: Count = Budget.denoiser
    """Pictures that denoiser and text encoder see."""
    decoder_pictures: Count = Budget.decoder
    """Pictures that the decoder sees after them, alone."""
    seed: Seed = 0
    """Of data and training."""


def parse(argv: Sequence[str], prog: str) -> Options | TeacherOptions:
    """The demo's options, or those of its teacher."""
    if [*argv[:1]] == ["teacher"]:
        about = "Make the teacher of emoji, from where an earlier call stopped."
        return parse_options(TeacherOptions, argv[1:], f"{prog} teacher", about)
    return parse_options(Options, argv, prog, str(__doc__))


def run(options: Options | TeacherOptions) -> None:
    if isinstance(options, Options):
        from stepdistill.cli._demo import run_demo

        run_demo(**options.model_dump())
        return
    import math
    from pathlib import Path

    from stepdistill.demo.emoji.teacher import make_teacher

    budget = Budget(
        options.autoencoder_pictures,
        options.denoiser_pictures,
        options.decoder_pictures,
        options.seed,
    )
    folder = make_teacher(
        Path(options.source), Path(options.output_dir), options.seconds or math.inf, budget
    )
    print(f"teacher: {folder}" if folder else "not done yet; the same command goes on from here")
