"""Run chains of `stepdistill` commands side by side and show one progress bar for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from stepdistill.core.stopping import PARENT


@dataclass(frozen=True)
class Stage:
    """One command of a chain. log: the run folder it logs to, or None where it has no log.

    total: steps (or seconds, where `by_seconds`) it will take; 0 where unknown. processes: that
    share it, by torchrun.
    """

    label: str
    command: Sequence[str]
    log: Path | None = None
    total: float = 0
    by_seconds: bool = False
    processes: int = 1

    @property
    def words(self) -> list[str]:
        """As a process is started with them."""
        launch: list[str] = []
        if self.processes > 1:
            launch = ["torch.distributed.run", "--standalone"]
            launch += ["--nproc_per_node", str(self.processes), "-m"]
        start = [sys.executable, "-m", *launch, "stepdistill.cli"]
        return [*start, *self.command]


class Chain:
    """Runs its stages one after another; call `poll` until `done`."""

    def __init__(self, output: Path, stages: Sequence[Stage]) -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        self.output, self._left = output, list(stages)
        self._file: IO[str] = output.open("w")
        self.stage = self._left[0]
        self._process = self._next()

    def _next(self) -> subprocess.Popen[str]:
        self.stage = self._left.pop(0)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment[PARENT] = str(os.getpid())
        if self.stage.processes > 1:
            del environment[PARENT]  # they are torchrun's children
        return subprocess.Popen(
            self.stage.words,
            env=environment,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def poll(self) -> bool:
        """Start the next stage where one has ended; true once all have.

        Errors: RuntimeError with the last lines of a stage that fails.
        """
        status = self._process.poll()
        if status is None:
            return False
        if status != 0:
            tail = "\n".join(self.output.read_text().strip().splitlines()[-8:])
            raise RuntimeError(f"{self.stage.label} failed:\n{tail}")
        if self._left:
            self._process = self._next()
            return False
        self._file.close()
        return True

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()


def last_line(log: Path) -> dict[str, float]:
    """The newest whole log line of a run; empty before the first."""
    try:
        lines = log.read_text().splitlines()
        return dict(json.loads(lines[-1])) if lines else {}
    except (OSError, json.JSONDecodeError):
        return {}


def watch(chains: Mapping[str, Chain]) -> None:
    """Show the chains' progress until all have ended. Errors: see Chain.poll; all are stopped."""
    columns = (
        TextColumn("  {task.description:<24}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("{task.fields[told]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns) as progress:
            tasks = {name: progress.add_task(name, told="loading", total=None) for name in chains}
            left = dict(chains)
            while left:
                time.sleep(0.3)
                for name, chain in list(left.items()):
                    stage = chain.stage
                    if chain.poll():
                        del left[name]
                    _show(progress, tasks[name], f"{name}: {stage.label}", stage)
    finally:
        for chain in chains.values():
            chain.stop()


def _show(progress: Progress, task: TaskID, label: str, stage: Stage) -> None:
    line = last_line(stage.log / "log.jsonl") if stage.log is not None else {}
    if not line:
        progress.update(task, description=label, told="", total=stage.total or None, completed=0)
        return
    losses = [f"{k.removeprefix('loss/')} {v:.3f}" for k, v in line.items() if k[:5] == "loss/"]
    progress.update(
        task,
        description=label,
        total=stage.total,
        completed=line["seconds" if stage.by_seconds else "step"],
        told=f"{', '.join(losses)}  {line['steps_per_second']:.1f} steps/s",
    )
