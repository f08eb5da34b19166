"""How a method says its students of a small data set are trained: plain values, no run.

Found by trial on the digits' teacher; they are recipes for 183k parameters, not for SDXL.
`config/recipes.py` lays them over what is common to all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class First:
    """A training before a recipe's own.

    method: whose. settings: see Recipe. share: of the student's time budget; 1: the recipe's own
    training is left out. gives: what that one starts from: the student, or its export as the model,
    teacher and student alike. always: whether students of every step count have it, by the method's
    options for so many; else those of one step alone.
    """

    label: str
    method: str
    settings: Mapping[str, Any]
    share: float
    gives: Literal["student", "model"] = "student"
    always: bool = False


@dataclass(frozen=True)
class Recipe:
    """One training a student. name: the method's own, or of a variant.

    settings: a config file's content over the common one, method options under method_config;
    by_steps is laid over it for a student's steps, of which the method's `for_steps` are sure.
    steps: the step counts it is meant for, where they are not the method's. layouts: the students
    it can train.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    by_steps: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    first: First | None = None
    layouts: tuple[str, ...] = ("full", "lora")
