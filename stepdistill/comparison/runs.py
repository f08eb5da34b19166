"""Trains and judges students, each in a process of its own; a finished one is never repeated.

Time is seconds of one processor core (on CUDA: of the wall clock): each run first measures its own
cost of an update, then trains as many updates as fill the budget, so that schedules end where they
should and a busy machine changes nothing. A recipe's first training is inside the budget; the
teacher's pairs, made once and shared, are not, and their time is stated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from stepdistill.data.pair_files import write_atomic
from stepdistill.demo.recipes import Training
from stepdistill.models.safe_files import read_json

from .ground import Ground
from .students import Budget, Student

PLAN = "comparison.json"
PROBE = (6, 26)  # updates of the two short runs whose difference is an update's cost


def clock() -> float:
    """Seconds so far: of this process's cores, or of the wall clock where a GPU works."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def ground_of(out: Path) -> Ground:
    """The ground that PLAN describes."""
    from .digits import Digits
    from .own_teacher import Own, OwnTeacher

    plan = read_json(out / PLAN, ("ground", "budget"))["ground"]
    if plan["kind"] == "digits":
        return Digits(out, **plan["options"])
    return OwnTeacher(out, Own(**plan["options"]))


def write_plan(out: Path, kind: str, options: dict[str, Any], budget: Budget, settled: Any) -> None:
    """Say in PLAN what is compared.

    Args: settled: what must be the same in every call with this folder.
    Errors: ValueError where an earlier call compared something else here.
    """
    facts = json.loads(json.dumps({"kind": kind, "settled": settled, "budget": str(budget)}))
    file = out / PLAN
    if file.is_file():
        known = read_json(file, ("settled", "budget"))
        differ = [name for name in facts if known.get(name) != facts[name]]
        if differ:
            raise ValueError(
                f"output_dir: expected {out} to hold a comparison with the same {differ[0]}, got "
                f"{known.get(differ[0])} there and {facts[differ[0]]} now. Choose another folder."
            )
    else:
        odd = {r["seconds"] for r in results(out)} - {budget.seconds}
        if odd:
            raise ValueError(
                f"output_dir: expected runs of {budget} in {out}, got some of {odd.pop():g}s. "
                "Choose another folder, or that budget."
            )
    out.mkdir(parents=True, exist_ok=True)
    ground = {"kind": kind, "options": options}
    file.write_text(json.dumps({**facts, "ground": ground}, indent=1) + "\n")


def results(out: Path) -> list[dict[str, Any]]:
    """The finished runs of a folder, by name."""
    return [read_json(f, ("rows",)) for f in sorted((out / "results").glob("*.json"))]


def failures(out: Path) -> list[dict[str, Any]]:
    """The failed runs of a folder: recipe, steps, seed, error."""
    return [read_json(f, ("error",)) for f in sorted((out / "failures").glob("*.json"))]


def result_file(out: Path, student: Student, seed: int) -> Path:
    """Where a finished run's rows lie."""
    return out / "results" / f"{student.name}_seed{seed}.json"


def seconds_per_update(ground: Ground, training: Training, scratch: Path) -> float:
    """Of one update: a longer run's over a shorter one's, starts cancelled."""
    spent = []
    for updates in PROBE:
        shutil.rmtree(scratch, ignore_errors=True)
        trainer = ground.trainer(training, updates, scratch, seed=0)
        start = clock()
        trainer.train()
        spent.append(clock() - start)
    shutil.rmtree(scratch)
    return max((spent[1] - spent[0]) / (PROBE[1] - PROBE[0]), 1e-6)


def run_student(ground: Ground, student: Student, seed: int, budget: Budget) -> None:
    """Train, export and judge one student; its result file is written last, whole."""
    if ground.threads is not None:
        torch.set_num_threads(ground.threads)
    out = ground.out
    work = out / "work" / f"{student.name}_seed{seed}"
    shutil.rmtree(work, ignore_errors=True)
    trainings = ground.trainings(student)
    updates, spent = [], 0.0
    for index, training in enumerate(trainings):
        last = index + 1 == len(trainings)
        if budget.updates is not None:
            updates.append(max(1, round(training.share * budget.updates)))
        else:
            cost = seconds_per_update(ground, training, work / "probe")
            updates.append(max(1, round(training.share * (budget.seconds or 0.0) / cost)))
        trainer = ground.trainer(training, updates[-1], work / ("last" if last else "first"), seed)
        start = clock()
        trainer.train()
        spent += clock() - start
        if not last and trainings[index + 1].starts_from == "model":
            trainer.export(work / "first" / "pipeline")
    rows = []
    for steps in student.steps:
        folder = trainer.export(work / f"pipeline_{steps}", steps)
        rows.append(ground.judge(student.recipe, steps, folder))
    facts = {"updates": updates, "cpu_seconds": spent, "seconds": budget.seconds, "seed": seed}
    content = {**facts, "budget": str(budget), "data": trainings[-1].data, "rows": rows}
    file = result_file(out, student, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, lambda aside: aside.write_text(json.dumps(content) + "\n"))
    shutil.rmtree(work)


def run_all(
    out: Path,
    chosen: Sequence[Student],
    seeds: Sequence[int],
    processes: int,
    threads: int,
    told: Callable[[str], None],
) -> None:
    """Every missing run, `processes` at a time, all students of a seed before the next seed's.

    A run that fails leaves a failure file with its last words; a later call tries it again.
    Args: told: called with a line after every run.
    """
    jobs = [(student, seed) for seed in seeds for student in chosen]
    jobs = [job for job in jobs if not result_file(out, *job).is_file()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
    running: list[tuple[subprocess.Popen[bytes], Student, int]] = []
    (out / "logs").mkdir(exist_ok=True)
    (out / "failures").mkdir(exist_ok=True)
    try:
        while jobs or running:
            while jobs and len(running) < processes:
                student, seed = jobs.pop(0)
                command = [sys.executable, "-m", "stepdistill.comparison.runs", str(out)]
                command += [json.dumps(asdict(student)), str(seed)]
                with _log(out, student, seed).open("wb") as log:
                    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                running.append((process, student, seed))
            time.sleep(0.2)
            for one in [one for one in running if one[0].poll() is not None]:
                running.remove(one)
                told(_ended(out, *one))
    finally:
        for process, _, _ in running:  # the caller was interrupted
            process.terminate()


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


def main(argv: Sequence[str] | None = None) -> None:
    """One run, in this process: OUT STUDENT SEED."""
    parser = argparse.ArgumentParser(description="One run of a comparison.")
    parser.add_argument("out", type=Path)
    parser.add_argument("student")
    parser.add_argument("seed", type=int)
    args = parser.parse_args(argv)
    raw = json.loads(args.student)
    student = Student(raw["recipe"], tuple(raw["steps"]))
    budget = Budget.parse(read_json(args.out / PLAN, ("budget",))["budget"])
    run_student(ground_of(args.out), student, args.seed, budget)


if __name__ == "__main__":
    main()
