"""Options that name what has to be there already: looked for before anything heavy is imported.

A type here says what an option's text names; `check_places` looks for all that are given.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel

from stepdistill.config.flags import fields_of
from stepdistill.loading.place import check_lora, check_model, require_there
from stepdistill.storage.files import EXPORT_RECORD, RUN_FILE


@dataclass(frozen=True)
class Place:
    """check(option, text): its errors are ValueErrors that name the option and what it expects."""

    check: Callable[[str, str], None]


def holding(name: str, what: str, advice: str) -> Place:
    """A folder with a file of that name in it."""

    def check(option: str, text: str) -> None:
        if not (Path(text) / name).is_file():
            raise ValueError(f"{option}: expected {what} with {name}, got {text!r}. {advice}")

    return Place(check)


Here = Annotated[str, Place(require_there)]  # a file or folder
Model = Annotated[str, Place(check_model)]  # a pipeline folder, a single file or a Hub id
Lora = Annotated[str, Place(check_lora)]  # path[:scale] of a file, a folder or a Hub id
RunFolder = Annotated[
    str, holding(RUN_FILE, "the output_dir of a training run", "Name that folder.")
]
Export = Annotated[
    str,
    holding(EXPORT_RECORD, "an exported folder", "Make one: stepdistill export RUN_DIR OUT."),
]


def _places(annotation: Any) -> Iterator[Place]:
    """Of an option's type, of its union's or its list's members."""
    for part in get_args(annotation):
        if isinstance(part, Place):
            yield part
        else:
            yield from _places(part)


def places_of(model: type[BaseModel]) -> dict[str, Place]:
    """Dotted name of every option that names something -> what."""
    named: dict[str, Place] = {}
    for name, info in fields_of(model).items():
        known = [part for part in info.metadata if isinstance(part, Place)]
        known += _places(info.annotation)
        if known:
            named[name] = known[0]
    return named


def check_places(options: BaseModel) -> None:
    """Errors: ValueError for the first thing that an option names and that is not there."""
    _check(places_of(type(options)), options.model_dump())


def check_given(values: Mapping[str, Any], argv: Sequence[str], model: type[BaseModel]) -> None:
    """The same of options that are not read yet: those of files, under flags."""
    named = places_of(model)
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in named:
        look.add_argument(f"--{name}", nargs="*", dest=name)
    flags = {
        name: given for name, given in vars(look.parse_known_args([*argv])[0]).items() if given
    }
    _check({name: place for name, place in named.items() if name not in flags}, values)
    for name, texts in flags.items():
        for text in texts if texts != ["null"] else ():  # which says none
            named[name].check(name, text)


def _check(named: Mapping[str, Place], values: Mapping[str, Any]) -> None:
    for name, place in named.items():
        value: Any = values
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        for text in (value,) if isinstance(value, str) else value or ():
            place.check(name, text)
