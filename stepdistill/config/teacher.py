"""The options that say which teacher, the same in every command that loads one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from stepdistill.config.flags import CommandOptions
from stepdistill.config.places import Lora, Model
from stepdistill.families import FAMILIES
from stepdistill.storage.own_code import named_by_user

if TYPE_CHECKING:
    from stepdistill.loading.source import ModelSource


class TeacherOptions(CommandOptions):
    """Which teacher: `source` is all of it in one value."""

    pretrained_model_name_or_path: Model
    """Teacher pipeline: local folder or Hub id."""
    revision: str | None = None
    """Hub revision of the teacher."""
    variant: str | None = None
    """Weight-file variant of the teacher, such as fp16."""
    teacher_lora: tuple[Lora, ...] = ()
    """LoRAs merged into the teacher first, each path[:scale]: a file, a folder or a Hub id."""
    single_file_config: Model | None = None
    """Pipeline folder or Hub id that describes a teacher kept in one .safetensors file."""
    family: str | None = None
    """FILE.py:CLASS of a Family of your own, for the pipeline classes that it names."""
    expert: Literal["both", "high", "low"] = "both"
    """Of a model with two denoisers (Wan 2.2 A14B) the one that is loaded and trained: that of high
    or of low noise; times are kept to its own."""

    @property
    def source(self) -> ModelSource:
        """The teacher."""
        from stepdistill.loading.source import ModelSource  # Diffusers: --help needs none

        if self.family is not None:
            named_by_user(FAMILIES, self.family)
        return ModelSource(
            self.pretrained_model_name_or_path,
            self.revision,
            self.variant,
            self.teacher_lora,
            self.single_file_config,
            expert=self.expert,
        )
