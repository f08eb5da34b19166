"""The files under a run: recipes with what they are laid over, and what models state of themselves.

A recipe (configs/recipes/) is a YAML file of plain options with a block `recipe:` beside them, a
model file (configs/models/) one with a block `model:`; both blocks are read here and are no options
of any command.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from stepdistill.config.yaml_files import read_yaml
from stepdistill.core.options import Data, Guidance, Options
from stepdistill.storage.bundled import bundled_names, config_file

B = TypeVar("B", bound=BaseModel)
MAX_DEPTH = 5  # of recipes laid over recipes


class About(Options):
    """The block of a recipe."""

    about: str
    """What it makes, in a line."""
    base: list[str]
    """Names or paths of the files that it is laid over, in order."""
    steps: list[int]
    """Step counts of the student it trains; none for a stage that ends in no few-step student."""
    data: Data
    """What it learns from."""
    family: str = ""
    """Family of its models; none means any."""
    model: str = "any"
    """The model that its values are for, as `plan` knows it; any for recipes by size."""
    size: Literal["", "small"] = ""
    """small: for models below 50 M parameters, where it is its method's default."""


class ModelFacts(Options):
    """The block of a model file."""

    family: str = ""
    """Its family, where the file has another name."""
    guidance: dict[str, Guidance | tuple[Guidance, Guidance]] = Field(default={})
    """Guidance g, null + g (cond - null), or its range, by method. A method that is not named takes
    that of a method of the same trainer, else that of "any"."""


@dataclass(frozen=True)
class Layer:
    """One file's options. kind: its folder in configs/ (methods, ...), "" of a user's own file."""

    name: str
    values: Mapping[str, Any]
    kind: str = ""
    recipe: About | None = None
    model: ModelFacts = field(default_factory=ModelFacts)


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `update` laid over it, nested mappings key by key."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        nested = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if nested else value  # type: ignore[arg-type]
    return merged


def merged(layers: Sequence[Layer]) -> dict[str, Any]:
    """The options of the layers, each laid over those before it."""
    values: dict[str, Any] = {}
    for layer in layers:
        values = merge(values, layer.values)
    return values


def layers_of(name: str | Path, depth: int = 0) -> list[Layer]:
    """The file of that path or name (dmd2, sdxl) of configs/, above those that it is laid over.

    Errors: ValueError where one is not there, or a block says what it can't.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"{name}: expected recipes at most {MAX_DEPTH} deep, got one in itself.")
    values = read_yaml(name)
    below: list[Layer] = []
    if isinstance(values.get("recipe"), str):
        below = recipe_layers(values.pop("recipe"), depth + 1)
    about = _block(values, "recipe", About, name)
    model = _block(values, "model", ModelFacts, name) or ModelFacts()
    for base in about.base if about else ():
        below += layers_of(base, depth + 1)
    file = config_file(name)
    kind = file.parent.name if file.parent.parent.name == "configs" else ""
    return [*below, Layer(file.stem, values, kind, about, model)]


def _block(values: dict[str, Any], name: str, kind: type[B], where: str | Path) -> B | None:
    """The block of that name, taken out of a file's values; None where it has none."""
    if not isinstance(values.get(name), Mapping):
        return None  # an option of that name, which the command knows or refuses
    try:
        return kind(**values.pop(name))
    except ValidationError as err:
        said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in err.errors())
        raise ValueError(f"{where}: expected a block {name} of its options, got {said}.") from err


def recipe_layers(name: str, depth: int = 0) -> list[Layer]:
    """The layers of a recipe of that name or path. Errors: ValueError naming the nearest."""
    known = bundled_names("recipes")
    if name.removesuffix(".yaml") not in known and not Path(name).is_file():
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f"--recipe: expected a recipe's name or file, got {name!r}. Nearest: {near or known}. "
            "`stepdistill recipes` lists them."
        )
    layers = layers_of(name, depth)
    if layers[-1].recipe is None:
        raise ValueError(
            f"--recipe: expected a file with a block recipe (about, base, ...), got {name!r} "
            "without. Name it with --config."
        )
    return layers


def recipe_files() -> dict[str, list[Layer]]:
    """The layers of every recipe of configs/recipes/ by its name."""
    return {name: layers_of(name) for name in bundled_names("recipes")}
