"""The checkpoint-N folders of a run by name: listed, the newest complete one found, discarded."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from stepdistill.storage.folders import fault_of

RUN_FILE = "run.json"  # beside the checkpoints: what the run is
_NAME = re.compile(r"checkpoint-(\d+)(\.old)?")


def is_checkpoint(name: str) -> bool:
    """Whether a folder of that name is a checkpoint's (or its predecessor's)."""
    return _NAME.fullmatch(name) is not None


def order_of(folder: Path) -> tuple[int, bool]:
    """Sorts checkpoint-N folders by step; checkpoint-N.old comes before its heir."""
    found = _NAME.fullmatch(folder.name)
    assert found is not None
    return int(found[1]), found[2] is None


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N folders, oldest first, whole or not; checkpoint-N.old comes before its heir."""
    found = [p for p in output_dir.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=order_of)


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
    gone = folder.with_name(folder.name + ".tmp")  # half a folder is no checkpoint
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)
