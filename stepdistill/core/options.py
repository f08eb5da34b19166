"""What all options have in common: unknown names are refused, and numbers are finite."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo

Seed = Annotated[int, Field(ge=0, lt=2**63)]  # what every random number generator here takes
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
# What a method learns from, the less to bring, the earlier; lowres: images that low-resolution ones
# are made of.
Data = Literal["prompts", "images", "pairs", "preferences", "lowres"]
PredictionType = Literal["x0", "eps", "v", "flow"]  # what a denoiser answers
PairSolver = Literal["ddim", "multistep"]  # of the teacher's ODE
Guidance = Annotated[float, Field(ge=0)]  # g of null + g (cond - null)


def _different(values: tuple[object, ...], info: ValidationInfo) -> tuple[object, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{info.field_name}: expected different ones, got {[*values]}.")
    return values


DIFFERENT = AfterValidator(_different)  # what is asked of each, asked twice, is a slip


def finite(text: str) -> float:
    """The number that a text says; nan where it says none, or one that is not finite."""
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


class Options(BaseModel):
    """Base of every group of options; a field's docstring is its help text."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
