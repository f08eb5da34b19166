"""The files under a run: recipes with what they are laid over, and what models state of themselves.

A recipe (configs/recipes/) is a YAML file of plain options with a block `recipe:` beside them, a
model file (configs/models/) one with a block `model:`; both blocks are read here and are no options
of any command. A recipe of several trainings holds their options in its block; RECIPE/TRAINING is
the recipe of one of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from typing_extensions import Self

from stepdistill.config.yaml_files import read_yaml
from stepdistill.core.options import Count, Data, Guidance, Options, PredictionType
from stepdistill.storage.bundled import bundled_names, config_file

B = TypeVar("B", bound=BaseModel)
MAX_DEPTH = 5  # of recipes laid over recipes


class MadePairs(Options):
    """Noise-image pairs that are made for a training, by its model; see `stepdistill pairs`."""

    num_pairs: Count
    num_steps: Count
    guidance: Guidance = 1.0


class _Trained(Options):
    """What a recipe and each of its trainings state."""

    about: str
    """What it makes, in a line."""
    base: list[str]
    """Names or paths of the files that it is laid over, in order."""
    steps: list[int]
    """Step counts of the student it trains; none for a stage that ends in no few-step student."""
    data: Data
    """What it learns from."""


class TrainingOfRecipe(_Trained):
    """One of a recipe's trainings; students and models are those of trainings before it."""

    student_of: str = ""
    """Its student begins at that one's; none begins at the model."""
    model_of: str = ""
    """Its model is that one's export; none means the model that is named."""
    pairs: MadePairs | str | None = None
    """Pairs that are made for it, or the training whose it shares."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Of --max_train_seconds; none means as much as each of the others."""
    lora: dict[str, Count] = Field(default={})
    """LoRA files of its student, by folder, for that many steps."""
    options: dict[str, Any]
    """Its options, as a file of its own would say them."""


class About(_Trained):
    """The block of a recipe."""

    trainings: dict[str, TrainingOfRecipe] = Field(default={})
    """Where it is several trainings, they by name, in order."""
    family: str = ""
    """Family of its models; none means any."""
    model: str = "any"
    """The model that its values are for, as `plan` knows it; any for recipes by size."""
    size: Literal["", "small"] = ""
    """small: for models below 50 M parameters, where it is its method's default."""
    called: str = ""
    """A user's name of its method (Method.aliases) that it is for: by that name the default."""
    by_prediction: dict[PredictionType, dict[str, Any]] = Field(default={})
    """What a network that answers so wants otherwise: options as the file has them."""

    @model_validator(mode="after")
    def _of_trainings_before(self) -> Self:
        before: list[str] = []
        for name, part in self.trainings.items():
            shared = part.pairs if isinstance(part.pairs, str) else ""
            for key, other in (
                *(("student_of", part.student_of), ("model_of", part.model_of)),
                ("pairs", shared),
            ):
                if other and other not in before:
                    raise ValueError(f"{name}.{key}: expected a training before it, got {other!r}")
            before.append(name)
        return self

    def training(self, name: str) -> About:
        """The block of one of its trainings."""
        part = self.trainings[name]
        stated = {key: getattr(part, key) for key in _Trained.model_fields}
        return self.model_copy(update={**stated, "trainings": {}})


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


def for_network(layers: Sequence[Layer], kind: PredictionType | None) -> list[Layer]:
    """The layers, and over each recipe what it says of networks that answer so."""
    made: list[Layer] = []
    for layer in layers:
        made.append(layer)
        about = layer.recipe
        if about is not None and kind is not None and kind in about.by_prediction:
            made.append(Layer(f"{layer.name} of {kind}", about.by_prediction[kind], layer.kind))
    return made


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
    """The layers of a recipe of that name or path, or of RECIPE/TRAINING.

    Errors: ValueError naming the nearest, or the trainings of a recipe of several.
    """
    recipe, slash, part = name.rpartition("/")
    if slash and not Path(name).is_file() and _is_recipe(recipe):
        return _training_layers(recipe, part, depth)
    if not _is_recipe(name):
        known = bundled_names("recipes")
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise ValueError(
            f"--recipe: expected a recipe's name or file, got {name!r}. Nearest: {near or known}. "
            "`stepdistill recipes` lists them."
        )
    layers = layers_of(name, depth)
    about = layers[-1].recipe
    if about is None:
        raise ValueError(
            f"--recipe: expected a file with a block recipe (about, base, ...), got {name!r} "
            "without. Name it with --config."
        )
    if about.trainings:
        raise ValueError(
            f"--recipe: expected one training, got {name}, which is several. `stepdistill train` "
            f"runs them all; here name one of {[f'{name}/{part}' for part in about.trainings]}."
        )
    return layers


def trainings_of(name: str) -> About | None:
    """The block of a recipe of several trainings; None of other recipes and other names."""
    if not _is_recipe(name):
        return None
    about = layers_of(name)[-1].recipe
    return about if about is not None and about.trainings else None


def _is_recipe(name: str) -> bool:
    return name.removesuffix(".yaml") in bundled_names("recipes") or Path(name).is_file()


def _training_layers(recipe: str, name: str, depth: int) -> list[Layer]:
    """Errors: ValueError for a training that the recipe has not."""
    *below, above = layers_of(recipe, depth)
    parts = above.recipe.trainings if above.recipe else {}
    if above.recipe is None or name not in parts:
        raise ValueError(
            f"--recipe: expected one of the trainings {[*parts]} of {recipe}, got {name!r}."
        )
    for base in parts[name].base:
        below += layers_of(base, depth + 1)
    values = merge(above.values, parts[name].options)
    return [*below, Layer(f"{recipe}/{name}", values, above.kind, above.recipe.training(name))]


@cache
def recipe_files() -> dict[str, list[Layer]]:
    """The layers of every recipe of configs/recipes/ by its name, and of every training of those
    of several; read once."""
    files: dict[str, list[Layer]] = {}
    for name in bundled_names("recipes"):
        parts = trainings_of(name)
        names = [f"{name}/{part}" for part in parts.trainings] if parts else [name]
        files |= {each: recipe_layers(each) for each in names}
    return files


def several_trainings() -> dict[str, About]:
    """The blocks of the recipes of configs/recipes/ that are several trainings, by name."""
    blocks = {name: trainings_of(name) for name in bundled_names("recipes")}
    return {name: about for name, about in blocks.items() if about is not None}
