"""The method that a name means: ours, a user's name for it, or a class in a file."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from stepdistill.config.layers import merge
from stepdistill.core.registry import is_file_class, plain_name
from stepdistill.methods import METHODS
from stepdistill.storage.own_code import named_by_user


def resolve_method(
    name: str, options: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """(a name in METHODS, options) of a method called by that, by a user's name for it, or by
    FILE.py:CLASS; none of the package is imported.

    What a user's name stands for lies under the options given. Errors: ValueError naming the
    nearest; see `Registry.add_file` for a file's.
    """
    given, plain = dict(options or {}), plain_name(name)
    if is_file_class(name):
        return named_by_user(METHODS, name), given
    if plain in METHODS:
        return plain, given
    known = {method: facts["aliases"] for method, facts in METHODS.index.items()}
    if not any(plain in aliases for aliases in known.values()):  # others have to be imported
        known |= {method: METHODS[method].aliases for method in METHODS.others}
    for method, aliases in known.items():
        if plain in aliases:
            return method, merge(aliases[plain], given)
    names = [*METHODS, *(alias for aliases in known.values() for alias in aliases)]
    near = difflib.get_close_matches(plain, names, n=3, cutoff=0.3)
    raise ValueError(
        f"method: expected one of {sorted(METHODS)}, got {name!r}. Nearest: {near or 'none'}."
    )
