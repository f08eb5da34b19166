"""How low-resolution images are made of those of the data: options alone, see degrade.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationInfo, model_validator
from typing_extensions import Self

from stepdistill.core.options import Options


def _power_of_two(factor: int, info: ValidationInfo) -> int:
    if factor < 2 or factor & (factor - 1):
        raise ValueError(
            f"data.degradation.{info.field_name}: expected a power of two above 1, got {factor}. "
            "Name 2, 4, 8 or 16"
        )
    return factor


Factor = Annotated[int, AfterValidator(_power_of_two)]


class Degradation(Options):
    """Of the image that an item becomes, in place of one beside it."""

    model_config = ConfigDict(frozen=True)

    factor: Factor | None = None
    """How many times smaller the low-resolution image is, a power of two; none: items have images
    beside them."""
    easier_factor: Factor | None = None
    """Likewise of what the teacher of scale_distill sees; none means half of factor."""
    kind: Literal["bicubic", "real_esrgan"] = "bicubic"
    """bicubic shrinks with antialiasing; real_esrgan blurs, resizes, adds noise and compresses
    twice, drawn anew for each sample and epoch."""
    prompt: str | None = Field(default=None)
    """One prompt for all images, such as "", where nobody described them; none reads captions."""

    @property
    def easier(self) -> int | None:
        """The factor of the easier image, where there is one."""
        if self.easier_factor is not None or self.factor is None:
            return self.easier_factor
        return self.factor // 2 if self.factor > 2 else None

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        given = self.model_dump(exclude_defaults=True)
        if self.factor is None and given:
            raise ValueError(f"data.degradation: expected factor beside {given}, got none")
        if (self.easier_factor or 0) >= (self.factor or 1):
            raise ValueError(
                f"data.degradation.easier_factor: expected less than factor {self.factor}, got "
                f"{self.easier_factor}"
            )
        return self


def check_factor(rule: Degradation | None, size: int | tuple[int, int] | None) -> None:
    """Errors: ValueError for images of that size, px, that the factor does not divide; of pictures
    smaller than it there would be nothing left."""
    factor = None if rule is None else rule.factor
    if factor is None or size is None:
        return
    sides = (size, size) if isinstance(size, int) else size
    if any(side % factor for side in sides):
        raise ValueError(
            f"data.degradation.factor: expected a divisor of the images' {sides[0]} x {sides[1]} "
            f"px, got {factor}. Lower it, or set --resolution."
        )
