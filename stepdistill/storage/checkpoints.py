"""The checkpoint-N folders of a run by name: listed, the newest complete one found, discarded."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from stepdistill.storage.files import temporary
from stepdistill.storage.folders import fault_of, holds_more

# The second form is folders.old_of; the last is an earlier version's, and perhaps a user's copy.
_NAME = re.compile(r"checkpoint-(\d+)|\.checkpoint-(\d+)\.stepdistill-old|checkpoint-(\d+)\.old")


def is_checkpoint(name: str) -> bool:
    """Whether a folder of that name is a checkpoint's (or its predecessor's)."""
    return _NAME.fullmatch(name) is not None


def order_of(folder: Path) -> tuple[int, bool]:
    """Sorts checkpoints by step; one that was put aside comes before its heir."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None
    return int(next(filter(None, match.groups()))), match[1] is not None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N folders, oldest first, whole or not, and those put aside before their heirs."""
    try:
        folders = [p for p in output_dir.iterdir() if is_checkpoint(p.name) and p.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(folders, key=order_of)


def newest_valid(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a line about each newer one that was skipped."""
    skipped: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        fault = fault_of(folder)
        if fault is None:
            return folder, skipped
        skipped.append(f"skipped {folder.name}: {fault}")
    return None, skipped


def step_of(folder: Path) -> int:
    """The student step of a checkpoint-N."""
    return order_of(folder)[0]


def discard(folder: Path) -> None:
    """Delete a checkpoint; a kill meanwhile leaves no half of one."""
    gone = temporary(folder)  # half a folder is no checkpoint
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def is_users(folder: Path) -> bool:
    """Whether a user may have put the checkpoint there, or a file into it: never deleted."""
    return folder.name.endswith(".old") or holds_more(folder)


def clear_left(output_dir: Path) -> None:
    """Delete what killed saves and deletions left, and predecessors of whole checkpoints."""
    for left in output_dir.glob(".checkpoint-*.stepdistill-tmp"):
        shutil.rmtree(left, ignore_errors=True)
    for old in output_dir.glob(".checkpoint-*.stepdistill-old"):
        if fault_of(output_dir / f"checkpoint-{step_of(old)}") is None:
            shutil.rmtree(old, ignore_errors=True)
