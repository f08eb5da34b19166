"""Files of a user's own code that a run's record names: run again only if the user has run them.

A record (run.json) may come with a model from anywhere, and must not say what code is run here.
Named on the command line or in a call, a file is run, and the hash of its content noted in the
user's own folder; a record leads to a file of a noted content alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stepdistill.core.registry import Registry
from stepdistill.storage.files import sha256_of


def _notes() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "stepdistill" / "own_code.txt"


def _noted() -> set[str]:
    with suppress(OSError):
        return set(_notes().read_text(encoding="utf-8").split())
    return set()


def named_by_user(registry: Registry[Any], text: str) -> str:
    """Add the class of FILE.py:CLASS that the user has named, and return its name.

    Errors: see `Registry.add_file`.
    """
    name = registry.add_file(text)
    digest = registry.files[name]["sha256"]
    if digest not in _noted():
        with suppress(OSError):  # a home that can't be written on: the file is named each time
            _notes().parent.mkdir(parents=True, exist_ok=True)
            with _notes().open("a", encoding="utf-8") as file:
                file.write(digest + "\n")
    return name


def recorded(registry: Registry[Any], flag: str, facts: Mapping[str, Any], where: Path) -> None:
    """Add the class that a run's facts name as `flag`_file, if any, and if the user has run that
    content before.

    Args: flag: the option that names such a class: method, family. where: the facts' file.
    Warns of a content that is not the recorded one. Errors: ValueError for a file that is gone, or
    that was never named here.
    """
    record = facts.get(f"{flag}_file")
    if record is None:
        return
    file, text = Path(record["file"]), f"{record['file']}:{record['class']}"
    if not file.is_file():
        raise ValueError(
            f"{where}: expected the file {file} that {record['class']} stands in, got none there. "
            "Put it back."
        )
    digest = sha256_of(file)
    if digest not in _noted():
        raise ValueError(
            f"{where}: expected {file} as it was when it was run, got a content that was never "
            f"named here. Look into it, then name it once: stepdistill list --{flag} {text}"
        )
    if digest != record["sha256"]:
        warnings.warn(f"{where}: {file} has changed since the run began.", stacklevel=2)
    registry.add_file(text)
