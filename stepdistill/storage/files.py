"""Single files, written in one piece or not at all, and JSON that is read with suspicion."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def one_line(err: object) -> str:
    """An error's text on one line, at most 300 characters."""
    return " ".join(str(err).split())[:300]


def read_json(path: str | Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """The object in a JSON file. Errors: ValueError for another content or a missing key."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f"{path}: expected valid JSON, got {one_line(err)}.") from err
    missing = required if not isinstance(found, dict) else [k for k in required if k not in found]
    if not isinstance(found, dict) or missing:
        got = f"no {missing[0]!r}" if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{path}: expected an object with {list(required)}, got {got}.")
    return found


def locked(path: Path) -> FileLock:
    """Within: one process at a time, of all that hold the lock of that path, PATH.lock."""
    return FileLock(path.with_name(path.name + ".lock"))


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary(path: Path, by: str = "") -> Path:
    """Where a file or folder is until it is whole: a name that nobody else gives to a thing, so
    that what is found there is a killed writer's. Args: by: told apart writers at one time."""
    return path.with_name(f".{path.name}{by}.stepdistill-tmp")


def free_name(path: Path) -> Path:
    """NAME.aside (-2, ...), where nothing lies yet."""
    names = (f"{path.name}.aside{f'-{n}' if n > 1 else ''}" for n in count(1))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.parent / name))


def set_aside(path: Path) -> Path:
    """Rename what is damaged or in the way to its `free_name`, which is returned."""
    free = free_name(path)
    os.replace(path, free)
    return free


def write_atomic(path: Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """Write beside `path` under a temporary name, flush to the disk, rename.

    A reader, or a kill at any instant, sees the old file or the new one.

    Args: shared: several processes may write this file at once, so each under a name of its own;
        else the name is always the same, so that a later call clears what a kill left.
    """
    aside = temporary(path, f".{os.getpid()}" if shared else "")
    try:
        write(aside)
        flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # a full disk gets its room back
        raise
    flush(path.parent)


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """`write_atomic` of a text."""
    write_atomic(path, lambda aside: aside.write_text(text, encoding="utf-8"), shared)
