"""What a user may say of an optimisation by score gradients; no torch, for --help."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from stepdistill.config.flags import AT_COMMAS
from stepdistill.config.places import Model
from stepdistill.config.teacher import TeacherOptions
from stepdistill.core.options import Count, Options, Positive, Seed
from stepdistill.losses.score_options import GRADIENT_KINDS, GradientKind, GradientSettings

Parameters = Literal["latents", "images", "voxels"]


class FakeConfig(Options):
    """The LoRA that vsd fits to what is optimised."""

    model_config = ConfigDict(frozen=True)

    rank: Count = 4
    """Of the LoRA, its alpha the same."""
    learning_rate: Positive = 1e-4
    """Of AdamW."""
    updates: Count = 1
    """Updates of the fake a step, each at times of its own."""
    blind_share: float = Field(default=0.1, ge=0, le=1)
    """How often it learns without the camera, where it is told one."""


class ParticleConfig(Options):
    """One optimisation: what is optimised, and how long."""

    model_config = ConfigDict(frozen=True)

    parameters: Parameters = "latents"
    """latents, images (through the autoencoder), or voxels: a grid of density and colour, seen by
    cameras around it."""
    num_particles: Count = 16
    """Of each prompt."""
    negative_prompt: str | None = None
    """Needed by nfsd; csd takes it too."""
    max_steps: Count = 500
    """Updates of the particles."""
    learning_rate: Positive = 0.03
    """Of Adam, on the particles."""
    batch_size: Count | None = None
    """Particles a step, drawn anew; none means all. Of voxels, cameras a step (4)."""
    grid_size: int = Field(default=24, ge=2)
    """Voxels to a side."""
    resolution: Count | None = None
    """Height and width in px; none means the model's own size."""
    fake: FakeConfig = FakeConfig()
    """vsd's LoRA."""
    seed: Seed = 0
    """Of every draw."""


def parse_gradient(text: str) -> tuple[GradientKind, float | None]:
    """(kind, guidance or None for the kind's own) of KIND[:GUIDANCE].

    Errors: ValueError for anything else.
    """
    name, _, number = text.partition(":")
    try:
        guidance = float(number) if number else None
    except ValueError:
        guidance = -1.0
    kind = next((kind for kind in GRADIENT_KINDS if kind == name), None)
    if kind is None or (guidance is not None and not 0 <= guidance < float("inf")):
        raise ValueError(
            f"gradients: expected KIND or KIND:GUIDANCE with one of {', '.join(GRADIENT_KINDS)} "
            f"and guidance >= 0, got {text!r}."
        )
    return kind, guidance


class ParticleOptions(ParticleConfig, TeacherOptions):
    pretrained_model_name_or_path: Model | None = None  # type: ignore[assignment]
    """Teacher pipeline: local folder or Hub id; none means the demo's, made in
    OUTPUT_DIR/teacher."""
    prompt: tuple[str, ...] = ()
    """What is optimised for, num_particles of each; the digits' teacher knows its own."""
    gradients: Annotated[tuple[str, ...], AT_COMMAS] = ("sds", "vsd")
    """KIND[:GUIDANCE] of sds, vsd, csd, csm, nfsd, bsd, recon, dreammat; an optimisation each.
    Unless it is said, the demo's digits get sds:1, sds:7.5 and vsd:1."""
    gradient: GradientSettings = GradientSettings()
    """Weights, times and annealed numbers of all of them."""
    teacher_steps: Count = 25
    """Steps of the teacher's solver for the row to compare with."""
    output_dir: str = "particles"
    """Folder of report and states; the same call goes on there."""

    @model_validator(mode="after")
    def _check_gradients(self) -> ParticleOptions:
        wanted = [parse_gradient(text) for text in self.gradients]
        if len({*wanted}) < len(wanted) or not wanted:
            raise ValueError(f"gradients: expected different ones, got {[*self.gradients]}.")
        if any(kind == "nfsd" for kind, _ in wanted) and self.negative_prompt is None:
            raise ValueError("negative_prompt: expected one with nfsd, got none.")
        if self.prompt and not all(self.prompt):
            raise ValueError("prompt: expected texts, got an empty one.")
        return self
