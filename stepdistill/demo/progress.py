"""Run several trainings side by side and show one progress bar for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def last_line(log: Path) -> dict[str, float]:
    """The newest whole log line of a run; empty before the first."""
    try:
        lines = log.read_text().splitlines()
        return dict(json.loads(lines[-1])) if lines else {}
    except (OSError, json.JSONDecodeError):
        return {}


def watch(commands: Mapping[Path, Sequence[str]], seconds: float | None) -> None:
    """Run `stepdistill` commands at once, each in its run folder's log, until all have ended.

    Args: commands: run folder -> arguments. seconds: their time budget, or None for steps.
    Errors: RuntimeError with the last lines of one that fails; the others are stopped.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    running = {}
    for run, command in commands.items():
        output = (run / "output.txt").open("w")
        running[run] = subprocess.Popen(
            [sys.executable, "-m", "stepdistill.cli", *command],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    columns = (
        TextColumn("  {task.description:<22}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns) as progress:
            tasks = {
                run: progress.add_task(
                    run.name, told="loading", total=seconds or _planned_steps(commands[run])
                )
                for run in running
            }
            while any(process.poll() is None for process in running.values()):
                time.sleep(0.5)
                for run, process in running.items():
                    line = last_line(run / "log.jsonl")
                    if line:
                        done = line["seconds"] if seconds else line["step"]
                        progress.update(tasks[run], completed=done, told=_told(line))
                    if process.poll() not in (None, 0):
                        raise RuntimeError(_failure(run))
            for run in running:
                progress.update(tasks[run], completed=progress.tasks[tasks[run]].total)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
    for run, process in running.items():
        if process.returncode != 0:
            raise RuntimeError(_failure(run))


def _planned_steps(command: Sequence[str]) -> int:
    config = yaml.safe_load(Path(command[command.index("--config") + 1]).read_text())
    return int(config["max_train_steps"])


def _told(line: Mapping[str, float]) -> str:
    losses = [
        f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k.startswith("loss/")
    ]
    return f"{', '.join(losses)}  {line['steps_per_second']:.1f} steps/s"


def _failure(run: Path) -> str:
    tail = "\n".join((run / "output.txt").read_text().strip().splitlines()[-8:])
    return f"training of {run.name} failed:\n{tail}"
