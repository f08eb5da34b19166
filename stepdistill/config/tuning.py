"""Tuning: the user's choice of how each trained role stores its weights. Methods never see it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from stepdistill.config.flags import AT_COMMAS
from stepdistill.core.options import Options

Quantization = Literal["none", "int8", "nf4"]  # here, so that reading options imports no network
Layout = Literal["lora", "full"]


class Tuning(Options):
    """How trained roles hold weights: an adapter on the one frozen base, or a copy of their own."""

    model_config = ConfigDict(frozen=True)

    student: Layout = "lora"
    """Student weights: "lora" (adapter on the frozen base) or "full" (own copy)."""
    fake: Layout = "lora"
    """Fake-score weights of distribution matching, likewise."""
    rank: int = Field(default=64, ge=1)
    """LoRA rank r of every adapter."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha (scale is alpha / rank); none means alpha = rank, scale 1. Always saved."""
    fake_rank: int | None = Field(default=None, ge=1)
    """LoRA rank of the fake's adapter; none means `rank`."""
    fake_alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha of the fake's adapter; none means `alpha`."""
    target_modules: Annotated[tuple[str, ...] | None, AT_COMMAS] = None
    """Module name endings that get an adapter; none means the family's list."""
    student_config: dict[str, Any] | str | None = None
    """Student of another architecture: keys of the denoiser's config to change, or a config.json.

    Such a student starts at random (nothing is copied) and needs student: full. A file is read
    once; the run keeps its content."""
    base_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of frozen base weights; auto follows mixed_precision. Trained weights are float32."""
    base_quantization: Quantization = "none"
    """Linear layers of the frozen base in 8 bits (int8, torchao) or 4 (nf4, bitsandbytes on CUDA).

    Needs LoRA roles. Exports merge into the weights as they were before."""

    @field_validator("student_config", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        if value is None or isinstance(value, Mapping):
            return value
        path = Path(str(value))
        try:
            content = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as err:
            raise ValueError(f"expected a mapping or a JSON file, got {value!r}: {err}") from err
        if not isinstance(content, dict):
            raise ValueError(f"expected an object in {path}, got {type(content).__name__}")
        return content

    @model_validator(mode="after")
    def _own_weights(self) -> Tuning:
        if self.student_config is not None and self.student != "full":
            raise ValueError(
                "student_config: expected student 'full' beside it (an adapter has its base's "
                f"architecture), got {self.student!r}. Set --tuning.student full"
            )
        return self

    @model_validator(mode="after")
    def _lora_on_quantized(self) -> Tuning:
        full = [role for role in ("student", "fake") if getattr(self, role) == "full"]
        if full and self.base_quantization != "none":
            raise ValueError(
                "base_quantization: expected LoRA roles on a quantised base (its weights can't be "
                f"trained), got full {' and '.join(full)}. Set --tuning.{full[0]} lora, or "
                "--tuning.base_quantization none"
            )
        return self

    @property
    def student_changes(self) -> Mapping[str, Any] | None:
        """The changes of the student's config, None for a student like the teacher."""
        assert not isinstance(self.student_config, str), "files are read on validation"
        return self.student_config

    def layout(self, role: str, follows: str | None = None) -> Layout:
        """The layout of a trained role, or of the EMA of one."""
        return self.fake if (follows or role) == "fake" else self.student

    def lora(self, role: str) -> tuple[int, float]:
        """(rank, alpha) of a role's adapter."""
        rank = self.fake_rank if role == "fake" and self.fake_rank else self.rank
        alpha = self.fake_alpha if role == "fake" and self.fake_alpha else self.alpha
        return rank, alpha if alpha is not None else float(rank)
