"""What is compared in a folder, and its runs, each in a process of its own (see student_run).

A finished one is never repeated; one that was cut off goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stepdistill.core.stopping import PARENT
from stepdistill.storage.files import located, read_json, write_text

from .budget import Budget
from .students import Student
from .teacher_setup import TeacherSetup

PLAN = "comparison.json"
ENDING_SECONDS = 30.0  # a run that is told to stop has that long to save
Setups = Mapping[str, Callable[..., TeacherSetup]]  # by kind, each of a folder and its options


def setup_of(out: Path, setups: Setups) -> TeacherSetup:
    """The setup that PLAN describes."""
    plan = read_json(out / PLAN, ("ground", "budget"))["ground"]
    return setups[plan["kind"]](out, **plan["options"])


def write_plan(
    out: Path, kind: str, options: dict[str, Any], budget: Budget, settled: Any, **more: Any
) -> None:
    """Say in PLAN what is compared.

    Args: settled: what must be the same in every call with this folder; more: what may change.
    Errors: ValueError where an earlier call compared something else here.
    """
    facts = json.loads(json.dumps({"kind": kind, "settled": settled, "budget": str(budget)}))
    file = out / PLAN
    if file.is_file():
        known = read_json(file, ("settled", "budget"))
        for name, there, now in _differing(known, facts):
            raise ValueError(
                f"output_dir: expected {out} to hold a comparison with the same {name}, got "
                f"{there} there and {now} now. Choose another folder."
            )
        earlier = known.get("left_out", {})
        more["left_out"] = {**earlier, **more.get("left_out", {})}
    else:
        odd = {r["seconds"] for r in results(out)} - {budget.seconds}
        if odd:
            raise ValueError(
                f"output_dir: expected runs of {budget} in {out}, got some of {odd.pop():g}s. "
                "Choose another folder, or that budget."
            )
    out.mkdir(parents=True, exist_ok=True)
    setup = {"kind": kind, "options": options}
    write_text(file, json.dumps({**facts, "ground": setup, **more}, indent=1) + "\n")


def _differing(
    known: Mapping[str, Any], facts: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(name, value there, value now) of what must be the same; names that an earlier version did
    not write down are passed over, and its paths stand as they were typed."""
    for name in ("kind", "budget"):
        if known.get(name) != facts[name]:
            yield name, known.get(name), facts[name]
    for name, now in facts["settled"].items():
        there = known["settled"].get(name, now)
        if now not in (there, located(there)):
            yield name, there, now


def check_finished(
    out: Path, setup: TeacherSetup, chosen: Sequence[Student], seeds: Sequence[int]
) -> None:
    """Errors: ValueError where a finished run of the folder was another than the one asked for."""
    for student, seed in ((student, seed) for seed in seeds for student in chosen):
        file = result_file(out, student, seed)
        if file.is_file():
            digest = read_json(file, ("rows",)).get("settings")
            if digest not in (None, setup.digest(student)):
                raise ValueError(
                    f"methods: expected {student.recipe} with the settings of its finished run, "
                    f"got others. Give it another name, or delete {file} to train it anew."
                )
        for other in sorted((out / "results").glob(f"{student.recipe}_*_seed{seed}.json")):
            rows = read_json(other, ("rows",))["rows"]
            counts = {row["steps"] for row in rows if row["label"] == student.recipe}
            if other != file and counts & set(student.steps):
                raise ValueError(
                    f"steps: expected {sorted(counts)} for {student.recipe} as in its finished "
                    f"run, got {list(student.steps)}: one seed would count twice. Give the same "
                    f"steps, choose another folder, or delete {other}."
                )


def results(out: Path) -> list[dict[str, Any]]:
    """The finished runs of a folder, by name."""
    return [read_json(f, ("rows",)) for f in sorted((out / "results").glob("*.json"))]


def failures(out: Path) -> list[dict[str, Any]]:
    """The failed runs of a folder: recipe, steps, seed, error."""
    return [read_json(f, ("error",)) for f in sorted((out / "failures").glob("*.json"))]


def result_file(out: Path, student: Student, seed: int) -> Path:
    """Where a finished run's rows lie."""
    return out / "results" / f"{student.name}_seed{seed}.json"


def run_all(
    out: Path,
    chosen: Sequence[Student],
    seeds: Sequence[int],
    processes: int,
    worker: Sequence[str],
    report: Callable[[str], None],
) -> None:
    """Every missing run, `processes` at a time, all students of a seed before the next seed's.

    A run that fails leaves a failure file with its last words; a later call tries it again.
    Args: worker: the command of a run, which student_run.main's arguments follow; report: called
        with a line after every run.
    """
    jobs = [(student, seed) for seed in seeds for student in chosen]
    jobs = [job for job in jobs if not result_file(out, *job).is_file()]
    threads = str(max(1, torch.get_num_threads() // processes))  # the user's, where they say so
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "TQDM_DISABLE": "1"}
    environment[PARENT] = str(os.getpid())
    running: list[tuple[subprocess.Popen[bytes], Student, int]] = []
    (out / "logs").mkdir(exist_ok=True)
    (out / "failures").mkdir(exist_ok=True)
    try:
        while jobs or running:
            while jobs and len(running) < processes:
                student, seed = jobs.pop(0)
                command = [*worker, str(out), json.dumps(asdict(student)), str(seed)]
                with _log(out, student, seed).open("wb") as log:
                    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                running.append((process, student, seed))
            time.sleep(0.2)
            for one in [one for one in running if one[0].poll() is not None]:
                running.remove(one)
                report(_ended(out, *one))
    finally:
        for process, _, _ in running:  # the caller was interrupted
            process.terminate()
        for process, _, _ in running:
            _wait(process)


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def _log(out: Path, student: Student, seed: int) -> Path:
    return out / "logs" / f"{student.name}_seed{seed}.txt"


def _ended(out: Path, process: subprocess.Popen[bytes], student: Student, seed: int) -> str:
    file = out / "failures" / f"{student.name}_seed{seed}.json"
    if process.returncode == 0:
        file.unlink(missing_ok=True)
        return f"{student.name} seed {seed}: done"
    lines = _log(out, student, seed).read_text(errors="replace").strip().splitlines()
    error = lines[-1] if lines else ""
    if process.returncode < 0:
        error = f"ended by signal {-process.returncode}. {error}".strip()
    fact = {**asdict(student), "seed": seed, "error": error[:400]}
    file.write_text(json.dumps(fact) + "\n")
    return f"{student.name} seed {seed}: FAILED, {error[:200]} (see {_log(out, student, seed)})"
