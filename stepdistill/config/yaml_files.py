"""Options from a YAML file: small, plain, and each key said once.

YAML 1.2's booleans are meant, true and false alone: `mixed_precision: no` is the word. A few lines
of aliases can describe gigabytes, so what they stand for is counted before anything is built.
"""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from stepdistill.storage.bundled import config_file
from stepdistill.storage.files import one_line

MAX_BYTES = 1 << 20
MAX_NODES = 20_000  # of the whole document, each alias counted as what it stands for
MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's yes, no, on and off."""


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag != _BOOL]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF"))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args: path: of the file, or a name such as dmd2 or sdxl of configs/.
    Errors: ValueError with file and line for a missing file, another shape, a key said twice, or
        more or deeper values than any options have.
    """
    file = config_file(path)
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: expected at most {MAX_BYTES} bytes, got {file.stat().st_size}.")
    try:
        loaded = copy.deepcopy(_loaded(file.read_text(encoding="utf-8-sig"), str(path)))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        raise ValueError(f"{path}: expected valid YAML, got {one_line(err)}.") from err
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a mapping of options, got {type(loaded).__name__}.")
    odd = [key for key in loaded if not isinstance(key, str)]
    if odd:
        raise ValueError(f"{path}: expected names of options, got {odd[0]!r}.")
    return loaded


@lru_cache(maxsize=256)
def _loaded(text: str, path: str) -> Any:
    """What a document says; one file is asked for by recipes, bases and commands in turn."""
    loader = _Loader(text)
    node = loader.get_single_node()
    if node is None:
        return {}
    _check(node, path)
    return loader.construct_document(node)


def _check(root: yaml.Node, path: str) -> None:
    """Errors: ValueError for a key said twice, an anchor within itself, or too much of anything."""
    count, left = 0, [(root, 0)]
    while left:
        node, depth = left.pop()
        count += 1
        where = f"{path}:{node.start_mark.line + 1}"
        if count > MAX_NODES or depth > MAX_DEPTH:
            raise ValueError(
                f"{where}: expected at most {MAX_NODES} values, {MAX_DEPTH} deep, got more (an "
                "alias counts as what it stands for, within itself without end)."
            )
        if isinstance(node, yaml.MappingNode):
            said: dict[Any, int] = {}
            for key, value in node.value:
                name, line = getattr(key, "value", None), key.start_mark.line + 1
                if isinstance(name, str) and name in said:
                    raise ValueError(
                        f"{path}:{line}: expected each option once, got {name!r} again (first in "
                        f"line {said[name]}). Keep one of them."
                    )
                if isinstance(name, str):
                    said[name] = line
                left += [(key, depth + 1), (value, depth + 1)]
        elif isinstance(node, yaml.SequenceNode):
            left += [(inner, depth + 1) for inner in node.value]
