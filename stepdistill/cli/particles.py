"""Optimise images, latents or a voxel scene of a prompt by score gradients (SDS, VSD, ...).

    stepdistill particles --gradients sds:100 vsd:7.5

Without a teacher: the demo's digits, with Frechet distance and recall. stepdistill/particles/ has
the page, and the class for a renderer of yours.
"""

from __future__ import annotations

from typing import Annotated

from stepdistill.config.flags import AT_COMMAS
from stepdistill.config.places import Model
from stepdistill.config.teacher import TeacherOptions
from stepdistill.core.options import Count
from stepdistill.particles.options import ParticleConfig


class Options(ParticleConfig, TeacherOptions):
    pretrained_model_name_or_path: Model | None = None  # type: ignore[assignment]
    """Teacher pipeline: local folder or Hub id; none means the demo's, made in
    OUTPUT_DIR/teacher."""
    prompt: tuple[str, ...] = ()
    """What is optimised for, num_particles of each; the demo's teacher knows its own."""
    gradients: Annotated[tuple[str, ...], AT_COMMAS] = ("sds", "vsd")
    """KIND[:GUIDANCE] of sds, vsd, csd, csm, nfsd, bsd, recon, dreammat; an optimisation each."""
    teacher_steps: Count = 25
    """Steps of the teacher's solver for the row to compare with."""
    output_dir: str = "particles"
    """Folder of report and states; the same call goes on there."""


def run(options: Options) -> None:
    from stepdistill.cli._particles import run_particles

    print(f"report: {run_particles(options)}")
