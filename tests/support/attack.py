"""Kills at seeded random instants, each followed by the same call, which must end bit for bit
alike.

What is killed is a child, forked from a process that has imported everything: a try costs no start.
Findings: kills; lost: tries after which less was there than before; differ: tries whose next call
ended otherwise than the one nobody touched; compared: files compared, byte for byte.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepdistill.cache.encoded import EncodedCache
from stepdistill.cache.precompute import fill
from stepdistill.core.method import Role
from stepdistill.data.stream import PromptDataset
from stepdistill.families.registry import load_family
from stepdistill.pairs.dataset import generate_pairs
from stepdistill.roles.rolebank import RoleBank
from stepdistill.trainers import trainer_of_run
from support.faults import killed_at, step_of
from support.processes import fork, status_of
from support.runs import build_trainer

# What is killed how often: in an update, in the changes of the file system of a save, of an export,
# of a cache's filling and of a pair set's.
PLAN = {"training": 30, "saving": 22, "export": 12, "cache": 12, "pairs": 12}
END = 3
PROMPTS = [f"thing {i}" for i in range(8)]
Contents = dict[str, bytes]


def contents(folder: Path, kinds: tuple[str, ...] = (".safetensors",)) -> Contents:
    """The bytes of a folder's files of these kinds, by path."""
    files = (p for p in folder.rglob("*") if p.suffix in kinds and p.is_file())
    shown = (p for p in files if p.name[0] != ".")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in shown}


def counted(work: Callable[[], None]) -> int:
    """How often `work` changes the file system (see killed_at), done in a child."""
    low, high = 1, 2
    while _killed(work, high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _killed(work, middle) else (low, middle)
    return low


def _killed(work: Callable[[], None], count: int) -> bool:
    def until() -> None:
        killed_at(count)
        work()

    status = status_of(fork(until))
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a child ended with {status}")
    return status != 0


def done(work: Callable[[], None]) -> None:
    """The work, in a child that nobody touches."""
    if status_of(fork(work)) != 0:
        raise RuntimeError("the call after a kill failed")


# --------------------------------------------------------------------- training
def _trainer(teacher: Path, out: Path) -> Any:
    return build_trainer(
        "dmd2", teacher, "lora", out, max_train_steps=END, checkpointing_steps=1, ema_decay=0.9,
        resume_from_checkpoint="latest",
    )  # fmt: skip


def _in_update(teacher: Path, out: Path, chance: random.Random, pace: float) -> bool:
    """Kill a run within a random update, or in what follows it."""
    update, seconds = chance.randrange(2 * END), chance.random() * pace
    read, write = os.pipe()

    def work() -> None:
        trainer = _trainer(teacher, out)
        going = trainer._update

        def told(*args: Any) -> None:
            os.write(write, b".")
            going(*args)

        trainer._update = told
        trainer.train()

    child = fork(work)
    os.close(write)
    begun = 0
    while begun <= update and os.read(read, 1):
        begun += 1
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.close(read)
    return status_of(child) == -signal.SIGKILL


def _in_save(teacher: Path, out: Path, chance: random.Random, _pace: float) -> bool:
    """Kill a run before a random change of the file system, of a random save and what follows."""
    step, count = chance.randint(1, END), chance.randint(1, 50)

    def work() -> None:
        trainer = _trainer(teacher, out)
        save = trainer.save

        def killed_save() -> Path:
            if trainer.step == step:
                killed_at(count)
            return save()

        trainer.save = killed_save
        trainer.train()

    return status_of(fork(work)) == -signal.SIGKILL


def runs(kind: str, teacher: Path, out: Path, kills: int) -> dict[str, Any]:
    """Kill runs and resume them."""
    whole = out / "whole"
    began = time.monotonic()
    done(lambda: _trainer(teacher, whole).train())
    pace = (time.monotonic() - began) / (3 * END)
    expected = contents(whole / f"checkpoint-{END}")
    found: dict[str, Any] = {"kills": 0, "lost": [], "differ": [], "compared": 0}
    for number in range(10 * kills):
        if found["kills"] == kills:
            break
        folder, chance = out / str(number), random.Random(f"{kind} {number}")
        attack = _in_update if kind == "training" else _in_save
        if not attack(teacher, folder, chance, pace):
            shutil.rmtree(folder)
            continue  # it had ended before
        found["kills"] += 1
        # A line of the log is written before its step is saved.
        log = folder / "log.jsonl"
        logged = log.read_text().count("\n") if log.is_file() else 0
        if step_of(folder) < logged - 1:
            found["lost"].append(number)
        done(lambda folder=folder: _trainer(teacher, folder).train())
        after = contents(folder / f"checkpoint-{END}")
        if after != expected or any(folder.rglob(".*stepdistill-*")):
            found["differ"].append(number)
        found["compared"] += len(after)
        shutil.rmtree(folder)
    return found


# ------------------------------------------------------------ export, cache, pairs
def writers(teacher: Path, out: Path) -> dict[str, Callable[[Path], None]]:
    """Of each kind what writes a folder, and goes on or begins again where it was killed."""
    run = out / "run"
    done(lambda: _trainer(teacher, run).train())
    family = load_family(teacher)

    def export(folder: Path) -> None:
        trainer_of_run(run).export(folder)

    def cache(folder: Path) -> None:
        data = PromptDataset(PROMPTS)
        with torch.no_grad():
            fill(EncodedCache(folder, family, None), data, torch.device("cpu"), 4096, say=str)

    def pairs(folder: Path) -> None:
        bank = RoleBank(load_family(teacher), {"teacher": Role()}, build_tuning())
        generate_pairs(
            bank["teacher"], family.encode, family.null, PROMPTS, folder, 6, times=(1.0, 0.5),
            shape=family.sample_shape(), model="m", batch_size=2, shard_size=2, progress=False,
        )  # fmt: skip

    return {"export": export, "cache": cache, "pairs": pairs}


def build_tuning() -> Any:
    """Of a bank without a student."""
    from stepdistill import Tuning

    return Tuning()


def folders(kind: str, write: Callable[[Path], None], out: Path, kills: int) -> dict[str, Any]:
    """Kill a folder's writer, over an earlier folder in half of the tries, and call it again."""
    kinds = (".safetensors", ".json", ".txt")
    whole = out / "whole"
    done(partial(write, whole))
    expected = contents(whole, kinds)
    sizes = iter(range(1000))
    changes = counted(lambda: write(out / f"size-{next(sizes)}-{os.getpid()}"))
    found: dict[str, Any] = {"kills": 0, "lost": [], "differ": [], "compared": 0}
    for number in range(10 * kills):
        if found["kills"] == kills:
            break
        folder, chance = out / str(number), random.Random(f"{kind} {number}")
        again = number % 2 == 1
        if again:
            done(partial(write, folder))
        if not _killed(partial(write, folder), chance.randint(1, changes)):
            continue
        found["kills"] += 1
        there = contents(folder, kinds)
        if again and kind != "export" and there != expected:
            found["lost"].append(number)
        done(partial(write, folder))
        after = contents(folder, kinds)
        left = [*folder.rglob(".*stepdistill-*"), *out.glob(f".{folder.name}.*")]
        if after != expected or left:
            found["differ"].append(number)
        found["compared"] += len(after)
    return found


def findings(teacher: Path, output_dir: Path, *parts: str) -> dict[str, Any]:
    """By kind, what was found. Args: parts: KIND:COUNT of some kinds; none: PLAN."""
    chosen = dict(part.split(":") for part in parts) or PLAN
    found: dict[str, Any] = {}
    made: dict[str, Callable[[Path], None]] = {}
    for kind, count in chosen.items():
        out = output_dir / kind
        out.mkdir(parents=True)
        if kind in ("training", "saving"):
            found[kind] = runs(kind, teacher, out, int(count))
        else:
            made = made or writers(teacher, output_dir)
            found[kind] = folders(kind, made[kind], out, int(count))
        print(kind, found[kind], file=sys.stderr, flush=True)
    return found
