"""Single files, written in one piece or not at all, and JSON that is read with suspicion."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock

from stepdistill.storage.writers import machine, runs

_OF_WRITER = re.compile(r"\.([0-9a-f]{8})-(\d+)\.stepdistill-tmp$")
_ELSEWHERE_SECONDS = 86400.0  # no file takes longer, on machines that can't be asked
RUN_FILE = "run.json"  # beside the checkpoints: what the run is
EXPORT_RECORD = "distillation.json"  # in an exported folder: what it is, and of which run
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def one_line(err: object) -> str:
    """An error's text on one line, at most 300 characters."""
    return " ".join(str(err).split())[:300]


def read_json(path: str | Path, required: Sequence[str] = ()) -> dict[str, Any]:
    """The object in a JSON file. Errors: ValueError for another content or a missing key."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        raise ValueError(f"{path}: expected valid JSON, got {one_line(err)}.") from err
    missing = required if not isinstance(value, dict) else [k for k in required if k not in value]
    if not isinstance(value, dict) or missing:
        got = f"no {missing[0]!r}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{path}: expected an object with {list(required)}, got {got}.")
    return value


def located(value: Any) -> Any:
    """A path of what is there (also in a list) as it is from any folder; all else as it is."""
    if isinstance(value, str):
        return os.path.realpath(value) if value and os.path.exists(value) else value
    return [located(one) for one in value] if isinstance(value, list | tuple) else value


def json_sha256(value: Any) -> str:
    """Of a value as JSON, whatever the order of its keys; what JSON has no form for, as text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def sha256_of(*paths: Path) -> str:
    """Of the files' bytes, end to end. Errors: OSError where one can't be read."""
    sha = hashlib.sha256()
    for path in paths:
        with path.open("rb") as handle:
            while block := handle.read(1 << 20):
                sha.update(block)
    return sha.hexdigest()


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


def temporary(path: Path, of_writer: bool = False) -> Path:
    """Where a file or folder is until it is whole: a name that nobody else gives to a thing, so
    that what is found there is a killed writer's.

    Args: of_writer: of this process alone, where several may write the same at once.
    """
    by = f".{_machine_mark()}-{os.getpid()}" if of_writer else ""
    return path.with_name(f".{path.name}{by}.stepdistill-tmp")


@cache
def _machine_mark() -> str:
    return hashlib.sha256(machine().encode()).hexdigest()[:8]


@cache
def _clear_once(folder: Path, _process: int) -> None:
    clear_left(folder)


def clear_left(folder: Path) -> None:
    """Delete the temporary files of writers that have ended; `write_atomic` does so once a folder
    and process, as it lists the folder."""
    for path in folder.glob(".*.stepdistill-tmp"):
        writer = _OF_WRITER.search(path.name)
        with suppress(OSError):
            if writer is None or not path.is_file():
                continue
            elsewhere = writer[1] != _machine_mark()
            old = time.time() - path.stat().st_mtime > _ELSEWHERE_SECONDS
            if old if elsewhere else not runs(int(writer[2])):
                path.unlink()


def free_name(path: Path) -> Path:
    """NAME.aside (-2, ...), where nothing lies yet."""
    names = (f"{path.name}.aside{f'-{n}' if n > 1 else ''}" for n in count(1))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.parent / name))


def set_aside(path: Path) -> Path:
    """Rename what is damaged or in the way to its `free_name`, which is returned."""
    free = free_name(path)
    os.replace(path, free)
    return free


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path` under a temporary name, flush to the disk, rename.

    A reader, or a kill at any instant, sees the old file or the new one. Several processes may
    write one file at once. The next process that writes in the folder clears what a kill left.
    """
    _clear_once(path.parent, os.getpid())
    aside = temporary(path, of_writer=True)
    try:
        write(aside)
        flush(aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)  # a full disk gets its room back
        raise
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_atomic` of a text."""
    write_atomic(path, lambda aside: aside.write_text(text, encoding="utf-8"))
