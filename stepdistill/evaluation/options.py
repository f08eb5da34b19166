"""What to evaluate and how: the options of `evaluate`, of its command and of whoever calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, model_validator
from typing_extensions import Self

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Here, Lora, Model
from stepdistill.core.options import DIFFERENT, Guidance, Seed

from .presets import preset

if TYPE_CHECKING:
    from stepdistill.loading.source import ModelSource


class Options(CommandOptions):
    """Options by the names of the command's flags; a preset's defaults lie under what is given."""

    model_config = ConfigDict(frozen=True)

    teacher: Model
    """Pipeline folder or Hub id."""
    student: Annotated[tuple[Lora, ...], DIFFERENT] = ()
    """Exports, run folders or other pipelines; none: the teacher alone, at its step counts."""
    steps: Annotated[tuple[int, ...], DIFFERENT] = ()
    """Step counts to export a run for."""
    teacher_steps: Annotated[tuple[int, ...], DIFFERENT] = (50,)
    """Step counts of the teacher; the most is the reference."""
    prompts_file: Here | None = None
    """One prompt (or class label) a line."""
    first_frames: Here | None = None
    """Of a pipeline that begins a video with an image, edits one or is controlled by one, in place
    of prompts: a folder of images and metadata.jsonl (file_name, text; mask_file_name of one that
    repaints; conditioning_file_name counts before file_name, so a training folder will do)."""
    output_dir: str = "evaluation"
    """Folder of the report; features lie there, so that a call that was cut off goes on."""
    features: Annotated[tuple[str, ...], DIFFERENT] = ()
    """Feature networks: digits, inception:FILE, clip:MODEL[,WEIGHTS], dino:DIR_OR_HUB_ID,
    FILE.py:NAME, MODULE:NAME, or a folder: of a Transformers vision model, or made by stepdistill
    features."""
    reference: Here | None = None
    """Folder of real images; none: the teacher's own are the reference."""
    preset: str | None = None
    """A protocol of the field; the presets are listed below."""
    num_prompts: int | None = None
    """The first ones; none means all."""
    num_images_per_prompt: int = 1
    """2 or more for diversity."""
    num_reference: int | None = None
    """The first images by name; none means all."""
    seeds: Annotated[tuple[Seed, ...], DIFFERENT] = (0,)
    """Noise seeds, a whole set of images each."""
    batch_size: int = 8
    """Images drawn at once; changes times alone."""
    shard_images: int = 64  # few enough for processes to share a small evaluation
    """Images between files, which processes share."""
    guidance: Guidance | None = None
    """Of the teacher, null + g (cond - null)."""
    student_guidance: Guidance = 1.0
    """Of students without distillation.json."""
    teacher_lora: tuple[Lora, ...] = ()
    """path[:scale] of each LoRA merged into the teacher."""
    single_file_config: Model | None = None
    """Pipeline folder of a single-file teacher."""
    resolution: int | None = None
    """Height and width in px."""
    num_frames: int | None = None
    """Of a video; none means the model's own."""
    frames: str | None = None
    """Of a video that are seen: first, all, or a number of them evenly apart; none means 4."""
    size_px: int | None = None
    """Resize to that side before the feature network."""
    crop_px: int | None = None
    """Take the middle patch of that side first."""
    resize_filter: Literal["lanczos", "bicubic", "bilinear", "box"] = "lanczos"
    """Of size_px."""
    nearest_k: int = 3
    """Neighbours of precision and recall."""
    dtype: Literal["float32", "bf16", "fp16"] = "float32"
    """Of the pipelines' weights."""
    clip: str | None = None
    """MODEL[,WEIGHTS] of a CLIP score: an open_clip model; with a file of OpenAI's weights the one
    named -quickgelu."""
    hps: str | None = None
    """File of HPSv2 weights."""
    aesthetic: str | None = None
    """HEAD[,WEIGHTS]: a linear head on OpenAI's CLIP ViT-L/14 (ViT-L-14-quickgelu); WEIGHTS: a
    local file of it."""
    num_previews: int = 12
    """Images shown of each."""

    @property
    def source(self) -> ModelSource:
        """The teacher."""
        from stepdistill.loading.source import ModelSource  # Diffusers: --help needs none

        return ModelSource.of(
            self.teacher,
            teacher_lora=self.teacher_lora,
            single_file_config=self.single_file_config,
        )

    @model_validator(mode="before")
    @classmethod
    def _over_preset(cls, data: Any) -> Any:
        name = data.get("preset") if isinstance(data, dict) else None
        return data if name is None else {**preset(name).options, **data}

    @model_validator(mode="after")
    def _steps_of_students(self) -> Self:
        if self.steps and not self.student:
            raise ValueError(
                f"steps: expected them beside --student, got {list(self.steps)} alone. Those of "
                "the teacher are --teacher_steps."
            )
        return self
