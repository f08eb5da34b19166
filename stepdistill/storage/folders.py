"""Files and folders that are written whole or not at all, and known to be whole when read back.

A folder is NAME.tmp until its last byte is on the disk; the manifest of sizes and hashes is its
last file. A folder that stands in the way of a new NAME is NAME.old until the new one is in place.
So there is no instant at which a kill leaves fewer whole folders than before.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.storage.files import PICKLED, flush, read_json

MANIFEST = "manifest.json"
_NAME = re.compile(r"([\w-]+/)?[\w-][\w.-]*")  # of a file in the folder, or in one within it


def _digest(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def aside_of(target: Path) -> Path:
    """Where a folder is until it is whole."""
    return target.with_name(target.name + ".tmp")


def write_folder(
    target: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Write a folder whole or not at all: temporary name, manifest last, fsync, rename.

    Args: tensors: file stem -> tensors. documents: file stem -> JSON-able value.
    Errors: OSError where the disk is full or does not let us; what was there before is untouched.
    """
    aside = aside_of(target)
    try:
        begin(target)
        fill(aside, tensors, documents)
        seal(target, manifest_entries(aside, aside.iterdir()))
    except (OSError, SafetensorError) as err:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk gets its room back
        raise not_written(target, str(err)) from err


def not_written(target: Path, why: str) -> OSError:
    """The error of a folder that could not be written."""
    return OSError(
        f"{target}: expected to write it, got {' '.join(why.split())}. "
        "Free some space or make the folder writable."
    )


def begin(target: Path) -> None:
    """An empty folder in place of whatever a killed save left."""
    shutil.rmtree(aside_of(target), ignore_errors=True)
    aside_of(target).mkdir(parents=True)


def fill(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], documents: Mapping[str, Any]
) -> None:
    """Write the files of `write_folder`."""
    for stem, state in tensors.items():
        save_file(dict(state), folder / f"{stem}.safetensors")
    for stem, value in documents.items():
        (folder / f"{stem}.json").write_text(json.dumps(value, indent=2), encoding="utf-8")


def manifest_entries(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """The manifest's entries of these files of the folder, which are on the disk then."""
    found = {}
    for path in sorted(files):
        flush(path)
        name = path.relative_to(folder).as_posix()
        found[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    return found


def seal(target: Path, manifest: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest, which vouches for all files beside it, and put the folder in place."""
    aside, old = aside_of(target), target.with_name(target.name + ".old")
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in [aside / MANIFEST, *(p for p in aside.iterdir() if p.is_dir()), aside]:
        flush(path)
    if target.exists() and old.exists() and fault_of(target) is not None:
        shutil.rmtree(target)  # the earlier one may be the good one
    _put_in_place(target)


def _put_in_place(target: Path) -> None:
    """Rename NAME.tmp, which is on the disk, to NAME; what was there is NAME.old meanwhile."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)
    os.replace(aside_of(target), target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Within: a path to write a folder at, which then takes the place of `target`, all or nothing;
    of the kind that needs no manifest, as others read it."""
    aside = aside_of(target)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            flush(path)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _put_in_place(target)


def fault_of(folder: Path, hashes: bool = True) -> str | None:
    """What is wrong with a written folder, or None where every file is as the manifest says.

    Args: hashes: read every byte; without, a file of the right size passes.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError as err:
        return f"no readable manifest ({err})"
    if not manifest:
        return "its manifest names no file"
    for name, facts in manifest.items():
        if (
            not _NAME.fullmatch(name)
            or not isinstance(facts, dict)
            or {*facts} != {"bytes", "sha256"}
        ):
            return f"its manifest has a malformed entry {name!r}"
    try:
        pickled = sorted(p.name for p in folder.rglob("*") if p.suffix.lower() in PICKLED)
        if pickled:
            return f"{pickled[0]} is pickled, which is not read"
        # Shards are read by the folder: one that was not written with the others is no part.
        shards = (p.relative_to(folder).as_posix() for p in folder.glob("*/*.safetensors"))
        foreign = sorted(name for name in shards if name not in manifest)
        if foreign:
            return f"{foreign[0]} is not in its manifest"
        for name, facts in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {facts['bytes']}"
            if hashes and _digest(path) != facts["sha256"]:
                return f"{name} has another sha256 than the manifest"
    except OSError as err:  # a failing disk, or no leave to read
        return f"it can't be read ({err})"
    return None
