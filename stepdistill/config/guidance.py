"""The teacher's guidance: what a model states of itself wins over what a method's file says.

A method's file in configs/methods holds its paper's value, which was found on the paper's model. A
model's file in configs/models holds that model's. Whatever else is laid over them (a recipe, a file
of one's own, a flag) wins over both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stepdistill.config.layers import Layer, ModelFacts, layers_of, merge
from stepdistill.methods import METHODS
from stepdistill.storage.bundled import bundled_names

if TYPE_CHECKING:
    from stepdistill.core.method import Method


def guided(
    cls: type[Method[Any]], layers: Sequence[Layer], options: Mapping[str, Any], family: str = ""
) -> dict[str, Any]:
    """The method's options with the guidance of the model that a run distils.

    Args: layers: the run's files. options: what they say of the method. family: of its teacher
        where that is known, asked where no model file is among the files.
    """
    if not _of_the_method(cls, layers):
        return dict(options)
    stated = [layer.model for layer in layers if layer.model.guidance]
    if not stated and family:
        stated = [file.model for file in model_files(family)]
    guidance = stated_for(cls, stated[-1]) if stated else None
    return merge(options, {} if guidance is None else cls.guided_by(options, guidance))


def model_files(family: str) -> list[Layer]:
    """The files of configs/models that are of that family."""
    files = [layer for name in bundled_names("models") for layer in layers_of(name)]
    return [one for one in files if (one.model.family or one.name) == family]


def what_changed(before: Mapping[str, Any], after: Mapping[str, Any], family: str) -> list[str]:
    """The line about the method's options that the teacher's family alone has settled, if any."""
    change = [name for name in after if after[name] != before.get(name)]
    if not change:
        return []
    (file, *_) = model_files(family)
    values = ", ".join(f"{name} {after[name]} in place of {before.get(name)}" for name in change)
    return [
        f"{values}, as configs/models/{file.name}.yaml states of {family} "
        f"(--method_config.{change[0]} for another)"
    ]


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
