"""What a model can be asked for, known before a library is imported or a weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepdistill.core.options import PredictionType
    from stepdistill.core.path import NoisePath


@dataclass(frozen=True)
class Abilities:
    """By a model's configurations; everything where nothing is known of it.

    told_guidance: whether a copy of it can be told the guidance (w). has_null: whether there is an
    empty condition to guide away from. kind: what its network answers.
    """

    path: NoisePath | None = None
    told_guidance: bool = True
    has_null: bool = True
    kind: PredictionType | None = None
