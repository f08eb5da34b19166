"""Who writes a folder now: a lock that names its owner, and outlives no process.

The lock is a small JSON file: host, process id, when that process started, and its command. One
whose process has ended is taken over; what another machine says can't be looked up, so that its
lock stays until it is deleted by hand.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stepdistill.storage.files import read_json, temporary
from stepdistill.storage.writers import machine, runs, started

_LOCK = ".stepdistill-lock"
_TAKING_SECONDS = 5.0  # from making the file to having written it


def lock_of(folder: Path, beside: bool = False) -> Path:
    """Its lock. Args: beside: of a folder that is replaced as a whole, so that it can hold none."""
    return folder.with_name(f".{folder.name}{_LOCK}") if beside else folder / _LOCK


def _me() -> dict[str, Any]:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]])[:80]
    return {
        "host": machine(),
        "pid": os.getpid(),
        "started": started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": command,
    }


def _runs(owner: dict[str, Any]) -> bool:
    """Whether the process is still there, as far as can be known."""
    if owner["host"] != machine():
        return True
    return runs(int(owner["pid"]), owner["started"])


def _owner(lock: Path) -> dict[str, Any] | None:
    """Who holds the lock; None where nobody does, or an ended process did.

    Errors: ValueError for a file that is being written just now.
    """
    try:
        owner = read_json(lock, ("host", "pid", "started", "since", "command"))
        return owner if _runs(owner) else None
    except (ValueError, TypeError):  # killed between making and writing it, or being made
        with suppress(OSError):
            if time.time() - lock.stat().st_mtime < _TAKING_SECONDS:
                return {"host": machine(), "pid": "?", "since": "now", "command": "?"}
        return None


def refuse_owned(folder: Path, where: str, beside: bool = False) -> None:
    """Errors: ValueError where another process writes that folder now."""
    lock = lock_of(folder, beside)
    owner = _owner(lock) if lock.is_file() else None
    if owner is None or (owner["host"], owner["pid"]) == (machine(), os.getpid()):
        return
    host = owner["host"].split()[0]
    away = "" if owner["host"] == machine() else f" If it has ended, delete {lock}."
    raise ValueError(
        f"{where}: expected a folder that no other process writes, got {folder}, which process "
        f"{owner['pid']} on {host} ({owner['command']}, since {owner['since']}) is writing. Wait "
        f"until it has ended, or choose another folder.{away}"
    )


@contextmanager
def owned(folder: Path, where: str, beside: bool = False) -> Iterator[None]:
    """Within: this process alone writes the folder, which is made where there is none, and goes
    again where nothing was written.

    What this process holds already is its own.
    Args: where: the option or command that names the folder, for the error.
    Errors: ValueError naming the process that writes it now.
    """
    lock = lock_of(folder, beside)
    made = _make(lock.parent)
    mine = json.dumps(_me())
    while True:
        try:
            with lock.open("x", encoding="utf-8") as file:
                file.write(mine)
            break
        except FileExistsError:
            refuse_owned(folder, where, beside)
            if _held_by_me(lock):
                yield
                return
            _take_away(lock)
    try:
        yield
    finally:
        if _held_by_me(lock):  # not in a fork
            lock.unlink(missing_ok=True)
            for parent in made:  # whoever failed before writing anything leaves nothing
                with suppress(OSError):
                    parent.rmdir()


def _make(folder: Path) -> list[Path]:
    """The folders, the innermost first, that were not there."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _held_by_me(lock: Path) -> bool:
    with suppress(ValueError):
        owner = read_json(lock)
        return (owner.get("host"), owner.get("pid")) == (machine(), os.getpid())
    return False


def _take_away(lock: Path) -> None:
    """Remove an ended process's lock; of several that try at once one does, and nobody a live one.

    Renamed first: what was renamed is looked at, and put back where it is a live one after all.
    """
    gone = temporary(lock, of_writer=True)
    with suppress(FileNotFoundError):
        os.replace(lock, gone)
        if _owner(gone) is not None:
            with suppress(FileExistsError):
                os.link(gone, lock)
        gone.unlink()
