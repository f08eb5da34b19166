"""Classes by name, found and never listed: a package's modules, and entry points of other packages.

A module of `package` counts where its source sets a class's `name` to the module's own; others'
classes are named by entry points of the group called like the package (its name -> module:Class).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, type[T]], Generic[T]):
    """name -> class. Names are read without importing; a class is imported when it is asked for.

    Args: package: dotted name. base: what every class derives from.
    Errors: ValueError where two go by one name, or an entry point leads to no such class.
    """

    def __init__(self, package: str, base: type[Any]) -> None:
        self.package, self.base = package, base
        self._loaded: dict[str, type[T]] = {}

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
            found = [v for v in vars(module).values() if getattr(v, "name", None) == place.name]
            return next(cls for cls in found if cls.__module__ == place.module)
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

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
