"""Read a RunConfig from YAML files and flags (see flags.py), its method's options typed too."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError, create_model

from stepdistill.config.flags import (
    CommandOptions,
    explain,
    parse_options,
    read_config_files,
)
from stepdistill.config.guidance import guided, say_what_changed
from stepdistill.config.layers import Layer, merge, merged, recipe_layers
from stepdistill.config.model_at_hand import ModelAtHand, is_known
from stepdistill.config.run import RunConfig
from stepdistill.core.method import Method, MethodConfig
from stepdistill.methods import METHODS

R = TypeVar("R", bound=RunConfig)


def resolve_method(
    name: str, options: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """(a name in METHODS, options) of a method called by that or by a user's name for it.

    What a user's name stands for lies under the options given. Errors: ValueError naming the
    nearest.
    """
    given, plain = dict(options or {}), name.lower().replace("-", "_")
    if plain in METHODS:
        return plain, given
    aliases = {alias: cls for cls in METHODS.values() for alias in cls.aliases}
    if plain in aliases:
        return aliases[plain].name, merge(aliases[plain].aliases[plain], given)
    near = difflib.get_close_matches(plain, [*METHODS, *aliases], n=3, cutoff=0.3)
    raise ValueError(
        f"method: expected one of {sorted(METHODS)}, got {name!r}. Nearest: {near or 'none'}."
    )


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
    by_size: bool = False,
) -> R:
    """The RunConfig that `--recipe NAME --config a.yaml b.yaml --flag value ...` describes.

    A recipe lies under the files, which lie under the flags; a model's own guidance lies over that
    of a method's file (see `guidance.guided`).

    Args: method: the default method of the launcher, where neither file nor flag names one.
        model: RunConfig, or one with options of a command's own besides. by_size: whether a small
        model gets a recipe of its size where neither recipe nor file is named, and the Hub is asked
        which family a teacher there is of.
    Errors: ValueError for unknown or malformed options; SystemExit for --help.
    """
    layers, rest = read_config_files(argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--recipe", nargs="?")
    given, rest = first.parse_known_args(rest)
    if given.recipe:
        layers = [*recipe_layers(given.recipe), *layers]

    def parsed(family: str = "") -> R:
        return _parsed(layers, rest, prog, method, about, model, family)

    run = parsed()  # mistakes are said before a library is imported
    if given.recipe:
        run = run.model_copy(update={"recipe": given.recipe})
    source = run.source
    if not is_known(source, ask=by_size):
        return run
    at_hand = ModelAtHand.of(source)
    if by_size and not layers:
        layers = at_hand.recipe_by_size(run.method)
        run = parsed() if layers else run
    at_hand.check_recipe(layers)
    settled = parsed(at_hand.family).model_copy(update={"recipe": given.recipe})
    say_what_changed(run.method_config, settled.method_config, at_hand.family)
    return settled


def _parsed(
    layers: Sequence[Layer],
    argv: Sequence[str],
    prog: str,
    method: str,
    about: str,
    model: type[R],
    family: str,
) -> R:
    """The RunConfig of those layers under those flags."""
    values = {**({"method": method} if method else {}), **merged(layers)}
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--method", nargs="?")
    given, others = first.parse_known_args([*argv])
    name = given.method or values.get("method")
    fields: dict[str, Any] = {k: (info.annotation, info) for k, info in model.model_fields.items()}
    if name:
        name, options = resolve_method(str(name), values.get("method_config"))
        options = guided(METHODS[name], layers, options, family)
        values = {**values, "method": name, **({"method_config": options} if options else {})}
        config = METHODS[name].Config
        fields["method_config"] = (config, config())
        argv = others if given.method else argv
    # The model's own rules are checked once the method's options have their types.
    typed = create_model("RunConfig", __base__=CommandOptions, **fields)
    parsed = parse_options(typed, argv, prog, about, values)
    try:
        return model(**parsed.model_dump())
    except ValidationError as err:
        raise explain(err, model, "config") from err
