"""Files and folders that are written whole or not at all, and known to be whole when read back.

A folder has a temporary name (see files.temporary) until its last byte is on the disk; the
manifest of sizes and hashes is its last file. A folder that stands in the way of a new one is put
aside until that is in place. So there is no instant at which a kill leaves fewer whole folders than
before.

Both names are of our making alone: nothing else is ever deleted. Folders of the kind that needs no
manifest hold a list of what was written (LEDGER); one with anything else in it is not replaced. One
of an earlier version, which wrote no list, gives its place and stays, under another name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.storage.files import (
    EXPORT_RECORD,
    PICKLED,
    flush,
    free_name,
    read_json,
    sha256_of,
    temporary,
)
from stepdistill.storage.owner import owned

MANIFEST = "manifest.json"
LEDGER = ".stepdistill.json"  # file -> its bytes and hash; hidden, so that it is not published
_EDITED_BYTES = 1 << 20  # no text that a person edits is larger
# What earlier versions, which wrote no ledger, marked an export or a demo's teacher with, and what
# else they wrote there: all names of files beside it, by their paths.
_RECORDS = (EXPORT_RECORD, "demo_teacher.json")
_EARLIER = re.compile(
    r"README\.md|samples\.png|pipeline_\w+\.py|[\w.-]+\.safetensors|"
    r"(model_index|distillation|demo_teacher|workflow|adapter_config)\.json|"
    r"\w+/([\w.-]+\.(json|safetensors|model|jinja|py)|merges\.txt|vocab\.txt)"
)
_NAME = re.compile(r"([\w-]+/)?[\w-][\w.-]*")  # of a file in the folder, or in one within it


def aside_of(target: Path) -> Path:
    """Where a folder is until it is whole."""
    return temporary(target)


def old_of(target: Path) -> Path:
    """Where a folder is while its heir takes its place."""
    return target.with_name(f".{target.name}.stepdistill-old")


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
    except BaseException as err:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk gets its room back
        if isinstance(err, OSError | SafetensorError):
            raise not_written(target, str(err)) from err
        raise


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
        found[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return found


def seal(target: Path, manifest: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest, which vouches for all files beside it, and put the folder in place."""
    aside, old = aside_of(target), old_of(target)
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in [aside / MANIFEST, *(p for p in aside.iterdir() if p.is_dir()), aside]:
        flush(path)
    if target.exists() and old.exists() and fault_of(target) is not None:
        shutil.rmtree(target)  # the earlier one may be the good one
    _put_in_place(target, _more_than_a_manifests)


def _more_than_a_manifests(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and holds_more(folder)


def _put_in_place(target: Path, users: Callable[[Path], object]) -> None:
    """Rename what is aside and on the disk to NAME; what was there is put aside meanwhile.

    Args: users: whether a folder holds a user's files.
    """
    if target.exists():
        _clear_old(target, users)
        os.replace(target, old_of(target))
    os.replace(aside_of(target), target)
    flush(target.parent)
    _clear_old(target, users)


def _clear_old(target: Path, users: Callable[[Path], object]) -> None:
    """Delete what has given its place to `target`; where a user's file lies in it, set it aside."""
    old = old_of(target)
    gone = temporary(old)
    shutil.rmtree(gone, ignore_errors=True)
    if not old.exists():
        return
    if users(old):
        free = free_name(target)
        os.replace(old, free)
        warnings.warn(
            f"{target}: what was there is now {free}. Delete that if it is of no use.",
            stacklevel=2,
        )
        return
    os.replace(old, gone)  # half a folder of ours would look like one with a user's files
    shutil.rmtree(gone, ignore_errors=True)


@contextmanager
def replacing(target: Path, where: str = "output") -> Iterator[Path]:
    """Within: a path to write a folder at, which then takes the place of `target`, all or nothing;
    of the kind that needs no manifest, as others read it.

    Args: where: see refuse_foreign.
    Errors: ValueError where `target` holds what was not written so, or another process writes it.
    """
    aside = aside_of(target)
    with owned(target, where, beside=True):
        refuse_foreign(target, where)
        if not target.exists() and old_of(target).is_dir():
            os.replace(old_of(target), target)  # killed between the two renames
        _clear_old(target, foreign_files)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            yield aside
            sign(aside)
            for path in sorted(aside.rglob("*")):
                flush(path)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        _put_in_place(target, foreign_files)


def sign(folder: Path) -> None:
    """List what the folder holds as written by us."""
    entries = {name: _entry(folder / name) for name in sorted(_files(folder)) if name != LEDGER}
    (folder / LEDGER).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def _files(folder: Path) -> Iterator[str]:
    """Every file and link in it, by its path from there."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            yield path.relative_to(folder).as_posix()


def _entry(path: Path) -> list[Any]:
    """[bytes, sha256]; of a large file, which nobody edits, no hash."""
    size = path.stat().st_size
    return [size, sha256_of(path) if size <= _EDITED_BYTES else None]


def _entries(file: Path) -> dict[str, Any]:
    """Of a ledger or manifest; none of one that can't be read."""
    with suppress(ValueError):
        return read_json(file)
    return {}


def foreign_files(folder: Path) -> list[str]:
    """What a folder holds that `replacing` has not written, or that was changed since."""
    entries = _entries(folder / LEDGER)
    names = (name for name in _files(folder) if name != LEDGER)
    return sorted(
        name
        for name in names
        if name not in entries
        or (folder / name).is_symlink()
        or entries[name] != _entry(folder / name)
    )


def _is_earlier(folder: Path) -> bool:
    """Whether an earlier version wrote the folder, and no file but those it may have written is
    there: known by names alone, so it is set aside, not deleted."""
    names = list(_files(folder))
    return (
        LEDGER not in names
        and any(name in names for name in _RECORDS)
        and all(_EARLIER.fullmatch(name) for name in names)
        and not any((folder / name).is_symlink() for name in names)
    )


def refuse_foreign(target: Path, where: str) -> None:
    """Errors: ValueError where `target` is there and holds anything that is not ours to delete.

    Args: where: the option or command that names it.
    """
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise ValueError(f"{where}: expected a folder to write, got {target}, which is none.")
    found = foreign_files(target)
    if found and not _is_earlier(target):
        raise ValueError(
            f"{where}: expected a new folder, or one that stepdistill wrote and nobody changed, "
            f"got {target} with {', '.join(found[:3])}{' ...' if found[3:] else ''}. Move "
            f"{'it' if len(found) == 1 else 'them'}, or choose another folder."
        )


def refuse_written_on(folder: Path, names: Iterable[str], where: str) -> None:
    """Errors: ValueError where a folder that is not ours yet holds one of the files that we write.

    Args: where: the option that names it.
    """
    for name in names:
        if os.path.lexists(folder / name):
            raise ValueError(
                f"{where}: expected a folder without {name}, got {folder}. Move that, or choose "
                "another folder."
            )


def delete_made(folder: Path, patterns: Sequence[str], where: str) -> None:
    """Delete a folder of ours, where there is one. Errors: see refuse_unlike."""
    refuse_unlike(folder, patterns, where)
    shutil.rmtree(folder, ignore_errors=True)


def refuse_unlike(folder: Path, patterns: Sequence[str], where: str) -> None:
    """Errors: ValueError where a folder, or an export in it, holds what we do not write.

    Args: patterns: of fnmatch, of the paths of files that we write beside folders that hold a list
        of theirs; where: names the folder.
    """
    names = list(_files(folder)) if folder.is_dir() else []
    listed = _listed(folder, names)
    odd = sorted(n for n in {*names} - listed if not any(fnmatch(n, one) for one in patterns))
    if odd or (os.path.lexists(folder) and not folder.is_dir()):
        raise ValueError(
            f"{where}: expected to find nothing in {folder} but what stepdistill wrote, got "
            f"{', '.join(odd[:3]) or 'a file'}. Move that, or choose another folder."
        )


def _listed(folder: Path, names: Iterable[str]) -> set[str]:
    """Of the files in a folder those that a ledger or a manifest beside them lists."""
    listed = set[str]()
    for mark in names:
        place, _, name = mark.rpartition("/")
        if name == LEDGER:
            ours = {*_files(folder / place)} - {*foreign_files(folder / place)}
        elif name == MANIFEST:
            ours = {MANIFEST, *_entries(folder / mark)}
        else:
            continue
        listed |= {f"{place}/{one}".lstrip("/") for one in ours}
    return listed


def holds_more(folder: Path) -> bool:
    """Whether a folder with a manifest holds a file that was not written with it, or has none."""
    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError:
        return True
    return any(name not in manifest and name != MANIFEST for name in _files(folder))


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
            if hashes and sha256_of(path) != facts["sha256"]:
                return f"{name} has another sha256 than the manifest"
    except OSError as err:  # a failing disk, or no leave to read
        return f"it can't be read ({err})"
    return None
