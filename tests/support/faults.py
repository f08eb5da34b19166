"""What goes wrong outside the program, done to it: kills and signals at chosen and random instants.

Parts: operations | kills:TRIES | signal:NAME | ranks | refused | orphans | stopped:ddp |
stopped:fsdp2. Every process is forked from one that has imported everything, so a try costs no
start.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stepdistill.cli import main as stepdistill
from stepdistill.loading.safe_files import read_tensors
from stepdistill.storage.checkpoints import list_checkpoints, newest_valid
from stepdistill.storage.folders import write_folder
from stepdistill.training.checkpoint import fault_of, prune
from support.processes import fork, forked_ranks, status_of
from support.runs import build_trainer

STEPS_A_TRY = 4  # a kill comes within this many steps of the first


def step_of(output_dir: Path) -> int:
    found, _ = newest_valid(output_dir)
    return int(found.name.split("-")[1].split(".")[0]) if found else 0


# ------------------------------------------------------- every operation of a save
def killed_at(count: int) -> None:
    """From now on, kill this process just before its count-th change of the file system."""
    changes = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
    left = [count]

    def hook(event: str, _args: Any) -> None:
        if event in changes:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _save(folder: Path, value: float) -> None:
    write_folder(folder, {"a": {"x": torch.full((8,), value)}, "b": {}}, {"s": {"value": value}})


def operations(_teacher: Path, out: Path) -> dict[str, Any]:
    """Rewrite checkpoint-3 of three and keep two, killed before each operation in turn."""
    tries, lost, unrepaired = 0, [], []
    while True:
        folder = out / f"at-{tries + 1}"
        for step in (1, 2, 3):
            _save(folder / f"checkpoint-{step}", step)
        newest = folder / "checkpoint-3"

        def rewrite(count: int, newest: Path = newest) -> None:
            killed_at(count)
            _save(newest, 30.0)
            prune(newest, 2)

        status = status_of(fork(partial(rewrite, tries + 1)))
        if status == 0:
            return {"tries": tries, "lost": lost, "unrepaired": unrepaired}
        tries += 1
        whole = [p for p in list_checkpoints(folder) if fault_of(p) is None]
        found, _ = newest_valid(folder)
        values = read_tensors(found / "a.safetensors")["x"] if found else torch.zeros(1)
        if step_of(folder) != 3 or len(whole) < 2 or float(values[0]) not in (3.0, 30.0):
            lost.append(tries)
        status_of(fork(partial(rewrite, 10**9)))
        names = sorted(p.name for p in folder.iterdir())
        if names != ["checkpoint-2", "checkpoint-3"] or fault_of(newest) is not None:
            unrepaired.append(f"{tries}: {names}")
        shutil.rmtree(folder)


# ------------------------------------------------------- random instants of a run
def _run(teacher: Path, out: Path, pipe: int, stop_at: int | None = None) -> None:
    """Train and save each step, telling the pipe of each event, until killed or `stop_at`."""
    trainer = build_trainer(
        "dmd2",
        teacher,
        "lora",
        out,
        max_train_steps=10**6,
        checkpointing_steps=1,
        checkpoints_total_limit=2,
        resume_from_checkpoint="latest",
        ema_decay=0.9,
    )
    save, restore = trainer.save, trainer.restore

    def telling_save() -> Path:
        os.write(pipe, f"saving {trainer.step}\n".encode())
        folder = save()
        os.write(pipe, f"saved {trainer.step}\n".encode())
        if trainer.step == stop_at:
            os._exit(0)
        return folder

    def telling_restore(folder: Path) -> None:
        restore(folder)
        os.write(pipe, f"restored {trainer.step}\n".encode())

    trainer.save, trainer.restore = telling_save, telling_restore  # type: ignore[method-assign]
    trainer.train()


def _try(teacher: Path, out: Path, stop_at: int | None, wait: tuple[str, float]) -> list[str]:
    """The events of one child: killed `wait` seconds after its start or its first save."""
    read, write = os.pipe()
    child = fork(lambda: _run(teacher, out, write, stop_at))
    os.close(write)
    text, deadline = "", time.monotonic() + wait[1] if wait[0] == "start" else None
    while True:
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        if not select.select([read], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            deadline = None  # what it still had to say comes, then the end
            continue
        got = os.read(read, 4096).decode()
        if not got:
            break
        text += got
        if deadline is None and wait[0] == "save" and "saving" in text and wait[1] < 1e6:
            deadline = time.monotonic() + wait[1]
            wait = ("killed", 0.0)
    status = status_of(child)
    os.close(read)
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run ended with {status} after {text!r}")
    return text.splitlines()


def kills(teacher: Path, out: Path, tries: int) -> dict[str, Any]:
    """One run, killed again and again, against the run that nobody touched."""
    never, chance = ("save", 1e9), random.Random(0)
    began = time.monotonic()
    _try(teacher, out / "timing", 3, never)
    pace = (time.monotonic() - began) / 8
    killed, facts = out / "killed", {"tries": tries, "lost": 0, "in_save": 0, "in_start": 0}
    for _ in range(tries):
        before = step_of(killed)
        early = chance.random() < 0.1
        seconds = chance.random() * pace * STEPS_A_TRY
        events = _try(teacher, killed, None, ("start" if early else "save", seconds))
        saved = [int(e.split()[1]) for e in events if e.startswith("saved")]
        restored = [int(e.split()[1]) for e in events if e.startswith("restored")]
        facts["in_save"] += bool(events) and events[-1].startswith("saving")
        facts["in_start"] += not saved and not any(e.startswith("saving") for e in events)
        fell_back = bool(restored) and restored != [before]
        facts["lost"] += step_of(killed) < max([before, *saved]) or fell_back
    end = step_of(killed) + 1
    _try(teacher, killed, end, never)
    _try(teacher, out / "whole", end, never)
    return {**facts, "steps": end, "differ": _differ(killed, out / "whole", end)}


def _differ(one: Path, other: Path, step: int) -> list[str]:
    """Tensor files of two runs' checkpoints at that step whose bytes are not the same."""
    a, b = (
        json.loads((p / f"checkpoint-{step}" / "manifest.json").read_text()) for p in (one, other)
    )
    names = [name for name in {*a, *b} if name.endswith(".safetensors")]
    return sorted(name for name in names if a.get(name) != b.get(name))


# --------------------------------------------------------------------- signals
def _launched(teacher: Path, out: Path, *flags: str) -> None:
    config = Path(__file__).parents[2] / "configs" / "methods" / "dmd2.yaml"
    fixed = "--tuning.rank 2 --train_batch_size 2 --mixed_precision no --ema_decay 0.9 "
    fixed += "--gradient_accumulation_steps 1 --logging_steps 1 --disable_progress_bar"
    command = ["--config", str(config), "--pretrained_model_name_or_path", str(teacher)]
    command += [
        "--data.prompts_file",
        str(out.parent / "prompts.txt"),
        "--output_dir",
        str(out),
        *fixed.split(),
    ]
    stepdistill(["train", *command, "--checkpointing_steps", "0", *flags])


def _wait_for_a_step(out: Path, child: int) -> None:
    for _ in range(3000):
        if (out / "log.jsonl").is_file() and (out / "log.jsonl").read_text():
            return
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.02)
    raise RuntimeError("the run made no step")


def signalled(teacher: Path, out: Path, name: str) -> dict[str, Any]:
    """A run with a data worker, both of them signalled and the run resumed; and one that isn't."""
    forever = ("--max_train_steps", "1000000", "--dataloader_num_workers", "1")

    def grouped() -> None:
        os.setpgid(0, 0)
        _launched(teacher, out / "run", *forever)

    child = fork(grouped)
    _wait_for_a_step(out / "run", child)
    os.killpg(child, getattr(signal, name))
    status, step = status_of(child), step_of(out / "run")
    exported = (out / "run" / "pipeline").exists()
    until = ("--max_train_steps", str(step + 2))
    go_on = ("--resume_from_checkpoint", "latest")
    again = status_of(fork(lambda: _launched(teacher, out / "run", *until, *go_on)))
    whole = status_of(fork(lambda: _launched(teacher, out / "whole", *until)))
    return {
        "status": status,
        "step": step,
        "exported": exported,
        "later": [again, whole],
        "differ": _differ(out / "run", out / "whole", step + 2),
    }


def ranks(teacher: Path, out: Path) -> dict[str, Any]:
    """Two gloo processes, of which the second alone is signalled."""
    children = forked_ranks(
        2, lambda _: _launched(teacher, out / "run", "--max_train_steps", "1000000"), out
    )
    _wait_for_a_step(out / "run", children[0])
    os.kill(children[1], signal.SIGTERM)
    statuses = [status_of(child) for child in children]
    found, _ = newest_valid(out / "run")
    state = json.loads((found / "trainer_state.json").read_text()) if found else {}
    return {"statuses": statuses, "world_size": state.get("world_size"), "step": state.get("step")}


def refused(teacher: Path, out: Path) -> dict[str, Any]:
    """Two gloo processes, the second of which does not find the teacher on its machine."""

    def work(number: int) -> None:
        sys.stderr = (out / f"{number}.txt").open("w", buffering=1)
        _launched(out / "none" if number else teacher, out / "run")

    began = time.monotonic()
    statuses = [status_of(child) for child in forked_ranks(2, work, out)]
    told = [(out / f"{number}.txt").read_text().splitlines()[-1] for number in (0, 1)]
    return {"statuses": statuses, "told": told, "seconds": time.monotonic() - began}


def orphans(teacher: Path, out: Path) -> dict[str, Any]:
    """A launcher that is killed while its training runs."""

    def launcher() -> None:
        os.environ["TORCHELASTIC_RUN_ID"] = "x"
        child = fork(lambda: _launched(teacher, out / "run", "--max_train_steps", "1000000"))
        (out / "child").write_text(str(child))
        status_of(child)

    parent = fork(launcher)
    _wait_for_a_step(out / "run", parent)
    child = int((out / "child").read_text())
    again = ("--resume_from_checkpoint", "latest", "--max_train_steps", "1000000")
    meets = status_of(fork(lambda: _launched(teacher, out / "run", *again)))
    os.kill(parent, signal.SIGKILL)
    status_of(parent)
    ends = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < ends:
        time.sleep(0.1)
    events = (out / "run" / "events.jsonl").read_text().splitlines()
    end = json.loads(events[-1])
    return {"meets": meets, "state": end["state"], "saved": step_of(out / "run") == end["step"]}


VALIDATED = (
    *("--validation_steps", "1", "--validation_teacher_steps", "2"),
    *("--validation_prompts", '["a thing"]'),
)
# Samples beyond every bound from the second validation on, which the first process alone makes.
COLLAPSE = ("--learning_rate", "1", "--max_grad_norm", "1e9", "--watchdog.drift", "stop")


def stopped(teacher: Path, out: Path, wrapping: str) -> dict[str, Any]:
    """Two gloo processes validate a healthy run, and one that collapses."""
    found: dict[str, Any] = {}
    runs = {
        "healthy": ("--max_train_steps", "2"),
        "collapsed": ("--max_train_steps", "30", *COLLAPSE),
    }
    for name, flags in runs.items():

        def work(number: int, name: str = name, flags: tuple[str, ...] = flags) -> None:
            sys.stderr = (out / f"{name}-{number}.txt").open("w", buffering=1)
            _launched(teacher, out / name, *VALIDATED, *flags)

        sharded = {"ACCELERATE_USE_FSDP": str(wrapping == "fsdp2").lower(), "FSDP_VERSION": "2"}
        children = forked_ranks(2, work, out, **sharded)
        statuses = [status_of(child) for child in children]
        told = [(out / f"{name}-{number}.txt").read_text() for number in (0, 1)]
        found[name] = {
            "statuses": statuses,
            "told": ["stopped: " + text.partition("stopped: ")[2].strip() for text in told],
            "checkpoints": [p.name for p in list_checkpoints(out / name)],
            "exported": (out / name / "pipeline").is_dir(),
        }
    return found


def findings(teacher: Path, out: Path, *parts: str) -> dict[str, Any]:
    """By part, what was found."""
    found: dict[str, Any] = {}
    for part in parts:
        name, _, option = part.partition(":")
        folder = out / name / option
        folder.mkdir(parents=True)
        (folder / "prompts.txt").write_text("a\nb\nc\n")  # a run ends where it is touched
        if name == "kills":
            found[name] = kills(teacher, folder, int(option))
        elif name == "signal":
            found[part] = signalled(teacher, folder, option)
        elif name == "stopped":
            found[part] = stopped(teacher, folder, option)
        else:
            parts_alone = {
                "operations": operations,
                "ranks": ranks,
                "refused": refused,
                "orphans": orphans,
            }
            found[name] = parts_alone[name](teacher, folder)
    return found
