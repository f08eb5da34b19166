"""The teacher's guidance: what a model states of itself wins over what a method's file says.

A method's file in configs/methods holds its paper's value, which was found on the paper's model. A
model's file in configs/models holds that model's. Whatever else is laid over them (a recipe, a file
of one's own, a flag) wins over both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepdistill.config.layers import Layer, ModelFacts, layers_of
from stepdistill.methods import METHODS
from stepdistill.storage.bundled import bundled_names

if TYPE_CHECKING:
    from stepdistill.core.method import Method


def guided(
    cls: type[Method[Any]],
    layers: Sequence[Layer],
    options: Mapping[str, Any],
    family: str = "",
    has_null: bool = True,
) -> tuple[dict[str, Any], str]:
    """(what to lay over the method's options for the guidance of the model that a run distils, what
    says so).

    Args: layers: the run's files. options: what they say of the method. family: of its teacher
        where that is known, asked where no model file is among the files. has_null: whether the
        teacher has a null condition, without which there is no guidance.
    """
    if not _of_the_method(cls, layers):
        return {}, ""
    if not has_null:
        return cls.options_at(1.0), "this model has no null condition to guide away from"
    files = [layer for layer in layers if layer.model.guidance]
    if not files and family:
        files = model_files(family)
    guidance = stated_for(cls, files[-1].model) if files else None
    if guidance is None:
        return {}, ""
    changed, where = cls.guided_by(options, guidance), f"configs/models/{files[-1].name}.yaml"
    other = f"--method_config.{next(iter(changed), '')} for another"
    return changed, f"{where} states of {family} ({other})"


def model_files(family: str) -> list[Layer]:
    """The files of configs/models that are of that family."""
    files = [layer for name in bundled_names("models") for layer in layers_of(name)]
    return [one for one in files if (one.model.family or one.name) == family]


def _of_the_method(cls: type[Method[Any]], layers: Sequence[Layer]) -> bool:
    """Whether no file says the method's guidance, or one of configs/methods has the last word."""
    saying = [
        layer for layer in layers
        if not {*cls.guidance_options}.isdisjoint(layer.values.get("method_config") or {})
    ]  # fmt: skip
    return bool(cls.guidance_options) and (not saying or saying[-1].kind == "methods")


def stated_for(cls: type[Method[Any]], facts: ModelFacts) -> float | tuple[float, float] | None:
    """The guidance that a model states for a method; None where it states none."""
    names = [vars(base)["name"] for base in cls.__mro__ if "name" in vars(base)]
    names += [name for name, one in METHODS.index.items() if one["trainer"] == cls.trainer]
    return next((facts.guidance[n] for n in [*names, "any"] if n in facts.guidance), None)
