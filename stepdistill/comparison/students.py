"""Who is compared: one training for each method and step count, or for all its step counts at
once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stepdistill.config.recipes import recipes
from stepdistill.core.method import Data, Method
from stepdistill.reporting.values import any_of


@dataclass(frozen=True)
class Student:
    """One training to do. steps: what it is judged at; the first is the one it is trained for."""

    recipe: str
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.recipe}_{'_'.join(map(str, self.steps))}"

    @property
    def trained_for(self) -> int:
        return self.steps[0]


@dataclass(frozen=True)
class StepsServed:
    """What a method can be asked for. claims: step counts it is meant for; all of them by one
    student where one_student; data: what it learns from."""

    claims: tuple[int, ...]
    one_student: bool
    data: Data

    @classmethod
    def of_method(cls, method: type[Method[Any]]) -> StepsServed:
        """By the facts on its class."""
        return cls(method.steps, method.one_student, method.data)

    def of(self, steps: Sequence[int] | None, only_claims: bool) -> tuple[int, ...]:
        """The asked step counts that make sense; all claims where none are asked for.

        Args: only_claims: else a method of several steps also takes others above one.
        """
        if steps is None:
            return self.claims
        several = max(self.claims) > 1 and not only_claims
        return tuple(n for n in steps if n in self.claims or (several and n > 1))


def served_by_recipes() -> dict[str, StepsServed]:
    """Of the methods' recipes for the digits."""
    return {
        name: StepsServed(recipe.claims, recipe.method.one_student, recipe.method.data)
        for name, recipe in recipes().items()
    }


def left_out(served: Mapping[str, StepsServed], chosen: Sequence[Student]) -> dict[str, str]:
    """Method -> why no student of it was chosen."""
    names = {student.recipe for student in chosen}
    return {
        name: f"is asked for {any_of(one.claims, 'step')} alone"
        for name, one in served.items()
        if name not in names
    }


def students(
    served: Mapping[str, StepsServed], steps: Sequence[int] | None = None, only_claims: bool = True
) -> list[Student]:
    """A student for each step count, or one for all; those of one step (or of all steps) first."""
    made = []
    for name, one in served.items():
        counts = one.of(steps, only_claims)
        groups = [counts] if one.one_student and counts else [(n,) for n in counts]
        made += [Student(name, group) for group in groups]
    order = {1: 0, 4: 1, 2: 2}
    return sorted(made, key=lambda student: order.get(student.trained_for, student.trained_for))
