"""Classes by name, found and never listed: a package's modules, and entry points of other packages.

A module of `package` counts where its source sets a class's `name` to the module's own; others'
classes are named by entry points of the group called like the package (its name -> module:Class).
A class of a file that belongs to no package is added by FILE.py:CLASS, which runs the file.
What is to be known of the package's own without importing them stands in its index.json, which is
written from the classes (`python -c "from PACKAGE import NAME; NAME.write_index()"`).
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")
INDEX = "index.json"


def plain_name(name: str) -> str:
    """A name as ours are written, however a user writes it: Hyper-SD is hyper_sd."""
    return name.lower().replace("-", "_")


def is_file_class(text: str) -> bool:
    """Whether a name is FILE.py:CLASS."""
    return ".py:" in text


def from_file(text: str, where: str) -> tuple[Any, dict[str, str]]:
    """What FILE.py:CLASS (or any other name in the file) names, None where the file has no such
    name, and its record: file, class, sha256.

    The file is run, once for its content: it has to be one that the user has named.
    Errors: ValueError for a file that is not there, or that fails. Args: where: begins them.
    """
    path, _, called = text.rpartition(":")
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        raise ValueError(
            f"{where}: expected FILE.py:CLASS of a file that is there, got {text!r}. "
            "Name it by its path."
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    spec = spec_from_file_location(f"{file.stem}_{digest[:16]}", file)
    assert spec is not None, "a file that ends in .py has a loader"
    assert spec.loader is not None, "as above"
    module = sys.modules.get(spec.name)
    if module is None or module.__file__ != str(file):
        module = sys.modules[spec.name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as err:
            del sys.modules[spec.name]
            raise ValueError(
                f"{where}: expected {file} to run, got {type(err).__name__}: {err}. Mend it."
            ) from err
    return getattr(module, called, None), {"file": str(file), "class": called, "sha256": digest}


class Registry(Mapping[str, type[T]], Generic[T]):
    """name -> class. Names are read without importing; a class is imported when it is asked for.

    Args: package: dotted name. base: what every class derives from, or its module:Class. facts:
        attributes of the classes, or class methods without arguments, that the index holds.
    Errors: ValueError where two go by one name, or an entry point leads to no such class.
    """

    def __init__(self, package: str, base: type[Any] | str, facts: Sequence[str] = ()) -> None:
        self.package, self._base, self._facts = package, base, facts
        self._loaded: dict[str, type[T]] = {}
        self.files: dict[str, dict[str, str]] = {}  # of added classes, by name: file, class, sha256

    @cached_property
    def base(self) -> type[Any]:
        """What every class derives from; imported when it is first needed."""
        base = self._base
        return EntryPoint("", base, "").load() if isinstance(base, str) else base

    # ------------------------------------------------------------------ facts
    @cached_property
    def index(self) -> dict[str, dict[str, Any]]:
        """name -> facts of the package's own classes; none is imported."""
        file = files(self.package) / INDEX
        facts: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
        return facts

    @property
    def others(self) -> dict[str, str]:
        """Names of classes that the index can't know -> module:Class or FILE.py:CLASS."""
        places = {name: place for name, place in self._places.items() if place.attr is not None}
        of_files = {name: f"{f['file']}:{f['class']}" for name, f in self.files.items()}
        return {name: place.value for name, place in places.items()} | of_files

    def facts_of(self, cls: type[T]) -> dict[str, Any]:
        """The index's facts of a class."""
        values = {fact: getattr(cls, fact) for fact in self._facts}
        return {fact: value() if callable(value) else value for fact, value in values.items()}

    def index_text(self) -> str:
        """What index.json has to hold, from the classes."""
        facts = {name: self.facts_of(self[name]) for name in self if name not in self.others}
        return json.dumps(facts, indent=1) + "\n"

    def write_index(self) -> None:
        """Write index.json anew: after a class of the package, or a fact of one, has changed."""
        Path(str(files(self.package) / INDEX)).write_text(self.index_text(), encoding="utf-8")

    # ---------------------------------------------------------------- classes
    def add_file(self, text: str) -> str:
        """Add the class of FILE.py:CLASS, and return its name. The file is run: it has to be one
        that the user has named.

        Errors: ValueError for no such file or class, a file that fails, or a name that is taken.
        """
        cls, record = from_file(text, self.package)
        for name, known in self.files.items():
            if known == record:
                return name
        file, called = record["file"], record["class"]
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(
                f"{self.package}: expected a class {called} in {file} that derives from "
                f"{self.base.__name__}, got {cls!r}."
            )
        called_by = getattr(cls, "name", None)
        if not isinstance(called_by, str) or called_by in self._places:
            raise ValueError(
                f"{self.package}: expected a name of its own on {called} in {file}, got "
                f"{called_by!r}. Taken are {sorted(self._places)}."
            )
        self._loaded[called_by], self.files[called_by] = cls, record
        return called_by

    @cached_property
    def _places(self) -> dict[str, EntryPoint]:
        places = {}
        for file in sorted(files(self.package).iterdir(), key=lambda path: path.name):
            stem, _, suffix = file.name.rpartition(".")
            named = rf'^    name(: ClassVar\[str\])? = "{stem}"$'
            if suffix == "py" and re.search(named, file.read_text(encoding="utf-8"), re.MULTILINE):
                places[stem] = EntryPoint(stem, f"{self.package}.{stem}", self.package)
        for entry in entry_points(group=self.package):
            if entry.name in places:
                raise ValueError(
                    f"{self.package}: expected one {entry.name!r}, got {places[entry.name].value} "
                    f"and {entry.value}. Uninstall one, or rename its entry point."
                )
            places[entry.name] = entry
        return places

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._loaded:
            self._loaded[name] = self._load(self._places[name])
        return self._loaded[name]

    def _load(self, place: EntryPoint) -> type[T]:
        if place.attr is None:  # a module of the package: the class that is named like it
            module = import_module(place.module)
            classes = [v for v in vars(module).values() if getattr(v, "name", None) == place.name]
            return next(cls for cls in classes if cls.__module__ == place.module)
        try:
            cls = place.load()
        except (ImportError, AttributeError) as err:
            raise ValueError(self._wrong(place, f"{type(err).__name__}: {err}")) from err
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise ValueError(self._wrong(place, repr(cls)))
        named = getattr(cls, "name", None)
        if named != place.name:
            raise ValueError(self._wrong(place, f"one named {named!r}"))
        return cls

    def _wrong(self, place: EntryPoint, got: str) -> str:
        return (
            f"{self.package}: expected a {self.base.__name__} named {place.name!r} at the entry "
            f"point {place.value}, got {got}. Mend or uninstall the package that declares it."
        )

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter([*self._places, *self.files])

    def __len__(self) -> int:
        return len(self._places) + len(self.files)
