"""Options of any command from YAML files and flags: files merge left to right, flags come last.

A command's options are a pydantic model: names, types, defaults and help text in one place. Flags
and --help are made from it by pydantic-settings, values are checked by pydantic, and whatever is
wrong is a ValueError, which `mistakes_in_one_line` makes one line and status 1.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, NoReturn, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ValidationError, create_model
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, CliSettingsSource, SettingsConfigDict

from stepdistill.config.layers import Layer, layers_of, merge, merged
from stepdistill.core.options import Options
from stepdistill.core.stopping import STATUS, STOP_SIGNALS, Stopped, handling, raise_stopped

M = TypeVar("M", bound=BaseModel)


class CommandOptions(Options):
    """Base of a command's options; a field's docstring is its help text."""


def _at_commas(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return value
    return [part for text in texts for part in text.split(",") if part]


AT_COMMAS = BeforeValidator(_at_commas)  # of names, none of which holds a comma: a,b is a b


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Within: a user's mistake ends the process with one line and status 1."""
    try:
        yield
    except (ValueError, TypeError, FloatingPointError, OSError) as err:
        sys.exit("error: " + " ".join(str(err).split()))


@contextmanager
def ending_early() -> Iterator[None]:
    """Within: a stop signal or Ctrl-C unwinds what runs, and ends the process with status 75."""
    try:
        with handling(raise_stopped, STOP_SIGNALS):
            yield
    except (Stopped, KeyboardInterrupt) as stop:
        why = str(stop) or "Ctrl-C"
        print(f"stopped ({why}): nothing half made stays, the same call goes on.", file=sys.stderr)
        sys.exit(STATUS)


# ------------------------------------------------------------------------------------ files
def read_config_files(argv: Sequence[str]) -> tuple[list[Layer], list[str]]:
    """(the files of --config, in order, each with those that it is laid over; the other arguments).

    Errors: see `layers_of`.
    """
    first = _Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="+", action="extend", default=[])
    known, rest = first.parse_known_args(list(argv))
    return [layer for path in known.config for layer in layers_of(path)], rest


def taken(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """(the value of --NAME, None where it is not given; the other arguments)."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument(f"--{name}", nargs="?", dest="value")
    known, rest = first.parse_known_args([*argv])
    return known.value, rest


# ------------------------------------------------------------------------------------ names
def _members(annotation: Any) -> list[Any]:
    """The types of a union, without what annotates them."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, UnionType):
        return [annotation]
    return [member for one in get_args(annotation) for member in _members(one)]


def _is(annotation: Any, *kinds: type) -> bool:
    kind = get_origin(annotation) or annotation
    return isinstance(kind, type) and issubclass(kind, kinds)


def _sub_models(info: FieldInfo) -> list[type[BaseModel]]:
    return [one for one in _members(info.annotation) if _is(one, BaseModel)]


def fields_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every option of a config class by its dotted name."""
    fields = {}
    for name, info in model.model_fields.items():
        fields[prefix + name] = info
        for sub_model in _sub_models(info):
            fields |= fields_of(sub_model, f"{prefix}{name}.")
    return fields


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Up to three of the known names that are most like it."""
    return difflib.get_close_matches(name, list(known), n=3, cutoff=0.4)


def explain(err: ValidationError, model: type[BaseModel], where: str) -> ValueError:
    """One ValueError that lists what is wrong, with the nearest names for unknown keys."""
    lines = []
    for item in err.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            near = nearest(key, fields_of(model)) or "none"
            lines.append(f"expected a known option, got {key!r}. Nearest: {near}.")
        elif item["type"] == "missing":
            flag = "" if any(isinstance(part, int) for part in item["loc"]) else f" or as --{key}"
            lines.append(f"expected {key}, got nothing. Set it in a config file{flag}.")
        elif item["type"] == "value_error":  # a rule of ours, which says it all
            lines.append(f"{item['ctx']['error']}".rstrip(".") + ".")
        else:
            lines.append(f"{key}: {item['msg']}, got {item['input']!r}.")
    return ValueError(f"{where}: " + " ".join(lines))


# ------------------------------------------------------------------------------------ flags
class _Flags(BaseSettings):
    """How pydantic-settings makes flags of the fields; their values are read here."""

    model_config = SettingsConfigDict(cli_implicit_flags=True, cli_kebab_case=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"flags: {message}. {self.prog} --help lists the options.")


def _add(parser: Any, *names: str, **options: Any) -> Any:
    """add_argument of a field: lists take several values, as often as they are given."""
    if options.get("action") == "append":
        options |= {"action": "extend", "nargs": "+"}
        options["metavar"] = re.sub(r"^\w+\[(\w+)(,\.\.\.)?\]$", r"\1", options["metavar"])
    return argparse.ArgumentParser.add_argument(parser, *names, **options)


@lru_cache(maxsize=32)
def _parser_of(
    model: type[BaseModel], prog: str, about: str, first: tuple[str, ...], everything: bool
) -> _Parser:
    """The parser of a model's options; making it takes far longer than its use."""
    more = len(set(fields_of(model)) - set(first))
    parser = _Parser(
        prog=prog,
        usage=None if everything else f"{prog} [--config FILE ...] [--OPTION VALUE ...]",
        description=about,
        epilog=None if everything else f"{more} more options: {prog} --help all",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(group: Any, *names: str, **options: Any) -> Any:
        shown = everything or names[0][2:] in first
        return _add(group, *names, **options if shown else options | {"help": argparse.SUPPRESS})

    about_files = "YAML files of these options, merged left to right; flags are laid over them"
    parser.add_argument("--config", nargs="+", metavar="FILE", help=about_files)
    fields: dict[str, Any] = {k: (info.annotation, info) for k, info in model.model_fields.items()}
    shape = create_model(model.__name__, __base__=_Flags, **fields)
    CliSettingsSource(shape, root_parser=parser, add_argument_method=add)
    if not everything:  # sections would be empty but for their titles
        for group in parser._action_groups:
            if all(action.help == argparse.SUPPRESS for action in group._group_actions):
                group.title = group.description = None
    return parser


def parse_options(
    model: type[M],
    argv: Sequence[str],
    prog: str,
    about: str = "",
    values: Mapping[str, Any] | None = None,
    first: Sequence[str] = (),
) -> M:
    """The options that flags describe, laid over those of the files.

    Args: about: the command in a sentence, for --help. values: what the files of --config say;
        none: argv may hold them. first: the options that --help shows; `--help all` shows the rest
        too, as --help does where none are named.
    Errors: ValueError for unknown or malformed options; SystemExit for --help.
    """
    argv = list(argv)
    if values is None:
        layers, argv = read_config_files(argv)
        values = merged(layers)
    known = fields_of(model)
    everything = not first or ["--help", "all"] in map(list, pairwise(argv))
    parser = _parser_of(model, prog, about, tuple(first), everything)
    argv = _spelt_out([a for b, a in pairwise(["", *argv]) if (b, a) != ("--help", "all")], known)
    _check_known(argv, known)
    given = {name: text for name, text in vars(parser.parse_args(argv)).items() if name in known}
    for name in sorted(given, key=lambda name: name.count(".")):  # JSON of a group comes first
        value = _decoded(known[name].annotation, given[name], name)
        values = merge(values, _nested(name, value))
    try:
        return model(**values)
    except ValidationError as err:
        raise explain(err, model, "config") from err


def _spelt_out(argv: Sequence[str], known: Mapping[str, FieldInfo]) -> list[str]:
    """Flags as argparse takes them: --mapping.key 1 is --mapping key=1; a switch that takes a
    third value too (auto) gets the one that it stands for."""
    thirds = {
        name for name, info in known.items() if bool in (kinds := _members(info.annotation))
        and len(kinds) > 1
    }  # fmt: skip
    spelt: list[str] = []
    key = ""
    for arg, after in pairwise([*argv, "--"]):
        flag, equals, text = arg.partition("=")
        name = flag[2:] if flag.startswith("--") else ""
        mapping = _mapping_of(name, known)
        if key:
            spelt.append(f"{key}={arg}")
            key = ""
        elif name.removeprefix("no-") in thirds and name.startswith("no-"):
            spelt += [f"--{name[3:]}", "false"]
        elif name in thirds and not equals:
            spelt += [arg, "true"] if after.startswith("--") else [arg]
        elif mapping:
            key = name[len(mapping) + 1 :]
            spelt.append(f"--{mapping}")
            if equals:
                spelt.append(f"{key}={text}")
                key = ""
        else:
            spelt.append(arg)
    return spelt


def _mapping_of(name: str, known: Mapping[str, FieldInfo]) -> str:
    """The option, a mapping, that a dotted name is a key of; "" where there is none."""
    above = name.rpartition(".")[0]
    while above and name not in known:
        if above in known:
            kinds = _members(known[above].annotation)
            return above if any(_is(kind, Mapping) for kind in kinds) else ""
        above = above.rpartition(".")[0]
    return ""


def check_flags(argv: Sequence[str], model: type[BaseModel]) -> None:
    """Errors: ValueError for a flag that is no option of the model."""
    known = fields_of(model)
    _check_known(_spelt_out(argv, known), known)


def _check_known(argv: Sequence[str], known: Mapping[str, FieldInfo]) -> None:
    names = {*known, "help", "config", *(f"no-{name}" for name in known)}
    flags = [arg.split("=")[0][2:] for arg in argv if arg.startswith("--")]
    unknown = [flag for flag in flags if flag and flag not in names]
    if unknown:
        near = {flag: nearest(flag, known) for flag in unknown}
        raise ValueError(f"flags: expected known options, got {unknown}. Nearest: {near}.")


def _decoded(annotation: Any, value: Any, where: str) -> Any:
    """What pydantic is told of a flag's text or texts: JSON where that may be, `null` for none."""
    kinds = _members(annotation)
    texts = value if isinstance(value, list) else [value]
    if texts == ["null"] and type(None) in kinds:
        return None
    mappings = [kind for kind in kinds if _is(kind, Mapping, BaseModel)]
    sequences = [kind for kind in kinds if _is(kind, Sequence) and kind is not str]
    if mappings and (str not in kinds or any("=" in t or t.startswith("{") for t in texts)):
        return _mapping(texts, where)
    if not sequences:
        return texts[-1]
    numbers = {int, float} & {*get_args(sequences[0])}
    groups = any(_is(kind, BaseModel) for kind in get_args(sequences[0]))
    values: list[Any] = []
    for text in texts:
        listed = _json_or(text.split(",") if numbers else [text], text)
        values += listed if isinstance(listed, list) else [listed if groups else text]
    if numbers or groups:
        return values
    return [x if isinstance(x, str) else json.dumps(x) for x in values]


def _json_or(other: Any, text: str) -> Any:
    """What the text is as JSON, where it is some."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return other


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Errors: TypeError for a key said twice, of which json would keep the last."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise TypeError(f"flags: expected each key once, got {[key for key, _ in pairs]}.")
    return mapping


def _mapping(texts: Sequence[str], where: str) -> dict[str, Any]:
    """One mapping of JSON objects and of key=value, in which a dotted key is one in another."""
    mapping: dict[str, Any] = {}
    for text in texts:
        key, equals, rest = text.partition("=")
        value = _json_or(None, text)
        if not isinstance(value, dict):
            if not equals:
                raise ValueError(
                    f"{where}: expected KEY=VALUE or a JSON object, got {text[:100]!r}."
                )
            value = _nested(key, _json_or(rest, rest))
        mapping = merge(mapping, value)
    return mapping


def _nested(name: str, value: Any) -> dict[str, Any]:
    """The mapping in which a dotted name is the value."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]
