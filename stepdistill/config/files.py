"""Read a RunConfig from YAML files and flags (see flags.py), its method's options typed too."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ConfigDict, ValidationError, create_model

from stepdistill.config.flags import (
    CommandOptions,
    check_flags,
    explain,
    parse_options,
    read_config_files,
    taken,
)
from stepdistill.config.layers import Layer, merged, recipe_layers
from stepdistill.config.method_names import resolve_method
from stepdistill.config.model_at_hand import ModelAtHand
from stepdistill.config.places import check_given
from stepdistill.config.run import RunConfig
from stepdistill.config.suited import Why, settled, suited
from stepdistill.methods import METHODS

if TYPE_CHECKING:
    from stepdistill.core.method import Method, MethodConfig

R = TypeVar("R", bound=RunConfig)


def method_class(name: str) -> type[Method[Any]]:
    """The method of that name, see `resolve_method`."""
    return METHODS[resolve_method(name)[0]]


def method_config(name: str, options: Mapping[str, Any]) -> MethodConfig:
    """The validated Config of a method. Errors: ValueError naming unknown keys' neighbours."""
    name, options = resolve_method(name, options)
    cls = METHODS[name]
    try:
        return cls.Config(**options)
    except ValidationError as err:
        raise explain(err, cls.Config, f"method_config of {name}") from err


def parse_run_config(
    argv: Sequence[str],
    prog: str = "stepdistill",
    method: str = "",
    about: str = "",
    model: type[R] = RunConfig,  # type: ignore[assignment]
    early: bool = False,
    by_size: bool = False,
) -> R:
    """The RunConfig that `--recipe NAME --config a.yaml b.yaml --flag value ...` describes.

    A recipe lies under the files, which lie under the flags; what suits the model lies over a
    method's file (see `suited.py`).

    Args: method: the default method of the launcher, where neither file nor flag names one.
        model: RunConfig, or one with options of a command's own besides. early: say first, before
        the method is imported, if a flag is unknown or what an option names is not there. by_size:
        of a command that trains: a small model gets a recipe of its size where neither recipe nor
        file is named, the Hub is asked which family a teacher there is of, and what was settled
        stands in the run's `reasons` alone, to be said with the rest; it is warned of otherwise.
    Errors: ValueError for unknown or malformed options; SystemExit for --help.
    """
    layers, rest = read_config_files(argv)
    files = [layer.name for layer in layers]
    recipe, rest = taken(rest, "recipe")
    if recipe:
        layers = [*recipe_layers(recipe), *layers]

    if early:
        check_flags([arg for arg in rest if not arg.startswith("--method_config.")], model)
        check_given(merged(layers), rest, model)

    def read(layers: Sequence[Layer], at_hand: ModelAtHand) -> tuple[R, Why]:
        return _parsed(layers, rest, prog, method, about, model, at_hand)

    run, _ = read(layers, ModelAtHand())  # mistakes are said before a library is imported
    lines: list[str] = []
    at_hand = ModelAtHand.known(run.source, ask=by_size)
    if at_hand is not None:
        named, _ = taken(rest, "method")
        run, lines = settled(read, run, layers, at_hand, by_size, called=named or "")
        for line in () if by_size else lines:
            warnings.warn(f"method_config: {line}.", stacklevel=2)
    if recipe:
        run = run.model_copy(update={"recipe": recipe})
    run._reasons = [*_chosen(recipe, files, rest), *lines]
    return run


def _chosen(recipe: str | None, files: list[str], rest: Sequence[str]) -> list[str]:
    """What the user has named that settles a run: recipe, files, flags."""
    flags = [arg.split("=")[0][2:] for arg in rest if arg.startswith("--")]
    unsaid = ("data.", "pretrained_", "output_")  # a run says them elsewhere
    flags = [n for n in dict.fromkeys(flags) if n != "method" and not n.startswith(unsaid)]
    named = (("recipe", [recipe] if recipe else []), ("files", files), ("flags", flags))
    return [f"{kind} {', '.join(names)}" for kind, names in named if names]


def _parsed(
    layers: Sequence[Layer],
    argv: Sequence[str],
    prog: str,
    method: str,
    about: str,
    model: type[R],
    at_hand: ModelAtHand,
) -> tuple[R, Why]:
    """The RunConfig of those layers under those flags, and what the model at hand has settled."""
    values = {**({"method": method} if method else {}), **merged(layers)}
    named, others = taken(argv, "method")
    name = named or values.get("method")
    why: Why = {}
    config: type[MethodConfig] | None = None
    if name:
        name, options = resolve_method(str(name), values.get("method_config"))
        options, why = suited(METHODS[name], layers, options, at_hand)
        config = METHODS[name].Config
        place = METHODS.files.get(name)
        name = (
            f"{place['file']}:{place['class']}" if place else name
        )  # a saved form repeats the run
        values = {**values, "method": name, **({"method_config": options} if options else {})}
        argv = others if named else argv
    parsed = parse_options(_typed(model, config), argv, prog, about, values, model.first)
    try:
        return model(**parsed.model_dump()), why
    except ValidationError as err:
        raise explain(err, model, "config") from err


class _Described(CommandOptions):
    """Made of fields that have their help texts: looking for source code would take longest."""

    model_config = ConfigDict(use_attribute_docstrings=False)


@lru_cache(maxsize=32)
def _typed(model: type[CommandOptions], config: type[MethodConfig] | None) -> type[CommandOptions]:
    """The model's options with the method's own; its rules are checked once these have types."""
    fields: dict[str, Any] = {k: (info.annotation, info) for k, info in model.model_fields.items()}
    if config is not None:
        fields["method_config"] = (config, config())
    return create_model("RunConfig", __base__=_Described, **fields)
