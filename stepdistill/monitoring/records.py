"""Reads a run folder's records, finished or still being written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.storage.files import (
    RUN_FILE,
    free_name,
    one_line,
    read_json,
    set_aside,
    write_text,
)

from .best import BEST_FILE

LINES = ("log.jsonl", "validation.jsonl", "events.jsonl")
FILES = (RUN_FILE, BEST_FILE, *LINES, "report.html")
Record = dict[str, Any]
Points = list[tuple[float, float]]


def read_lines(path: Path) -> list[Record]:
    """The objects of a JSONL file; none where there is no file. A last line cut short is left out.

    Errors: ValueError for a line within that is no object.
    """
    if not path.is_file():
        return []
    records: list[Record] = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as err:
            if number == len(lines):
                break  # being written just now
            raise ValueError(f"{path}: expected JSON in line {number}, got {line[:40]!r}.") from err
        if not isinstance(record, dict):
            raise ValueError(f"{path}: expected an object in line {number}, got {line[:40]!r}.")
        records.append(record)
    return records


def mend(folder: Path, step: int) -> list[str]:
    """Make the records of a run that begins (again) at `step` fit to be written on.

    Lines past it belong to a run that was cut off, and go. What is damaged or of another kind is
    set aside as it is: nothing that a run needs lies in it.
    Returns: a line of what was set aside, for each such record.
    """
    lines = []
    for name in LINES:
        path = folder / name
        if not path.is_file():
            continue
        text, damaged = _cut(path.read_bytes(), step)
        if damaged:
            lines.append(f"{name}: {damaged} damaged lines left out, as it was: {_copy(path)}")
        write_text(path, text)
    for name in (RUN_FILE, BEST_FILE):
        path = folder / name
        try:
            if path.is_file():
                read_json(path)
        except ValueError as err:
            lines.append(f"{one_line(err)} Set aside as {set_aside(path).name}.")
    for name in FILES:
        path = folder / name
        if os.path.lexists(path) and not path.is_file():
            lines.append(f"{path}: in the way of a record, set aside as {set_aside(path).name}.")
    return lines


def _cut(raw: bytes, step: int) -> tuple[str, int]:
    """(a JSONL file's whole lines written up to `step`, but for those an early end added; how many
    lines were damaged). A last one that was cut short is none of these."""
    lines, damaged = [], 0
    for line in raw.split(b"\n")[:-1]:
        try:
            text = line.decode("utf-8")
            record = json.loads(text)
            at = record.get("logged", record["step"])
            if not isinstance(at, int):
                raise TypeError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            damaged += bool(line.strip())
            continue
        if at <= step and not record.get("early") and record.get("kind") != "end":
            lines.append(text + "\n")
    return "".join(lines), damaged


def _copy(path: Path) -> str:
    """The name of a copy beside it."""
    free = free_name(path)
    shutil.copyfile(path, free)
    return free.name


@dataclass(frozen=True)
class RunRecords:
    """All that is known of a run: its facts, log lines, validations, alarms, end and best."""

    folder: Path
    facts: Record
    log: list[Record]
    validations: list[Record]
    alarms: list[Record]
    end: Record | None
    best: Record | None

    @property
    def step(self) -> int:
        """Student updates done, as far as told."""
        last = (*self.log[-1:], *self.validations[-1:], self.end or {})
        return int(max(record.get("step", 0) for record in last))


def read_run(folder: Path) -> RunRecords:
    """Errors: ValueError where the folder holds no run, or a record is malformed."""
    facts = folder / "run.json"
    if not facts.is_file():
        raise ValueError(
            f"report: expected a run's folder with run.json, got {folder}. Give the output_dir of "
            "a training run."
        )
    try:
        content = json.loads(facts.read_text(encoding="utf-8"))
        pointer = folder / "best.json"
        best = json.loads(pointer.read_text(encoding="utf-8")) if pointer.is_file() else None
    except json.JSONDecodeError as err:
        raise ValueError(f"report: expected JSON in {folder}, got {err}.") from err
    events = read_lines(folder / "events.jsonl")
    ends = [event for event in events if event.get("kind") == "end"]
    return RunRecords(
        folder,
        content,
        read_lines(folder / "log.jsonl"),
        read_lines(folder / "validation.jsonl"),
        [event for event in events if event.get("kind") == "alarm"],
        ends[-1] if ends else None,
        best,
    )


def series(records: Iterable[Mapping[str, Any]], prefix: str) -> dict[str, Points]:
    """Name after `prefix` -> (step, value) points, of the records' numbers."""
    points: dict[str, Points] = {}
    for record in records:
        for key, value in record.items():
            if key.startswith(prefix) and isinstance(value, (int, float)):
                points.setdefault(key[len(prefix) :], []).append((record["step"], value))
    return points
