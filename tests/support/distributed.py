"""Trainings on several gloo processes, described as jobs, and what each process saw of them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.roles.role_weights import full_tensor, to_cpu
from stepdistill.trainers import DistillationTrainer
from stepdistill.training.checkpoint import optimizer_state
from support.processes import forked_ranks
from support.runs import build_trainer

GLOBAL_BATCH = 6  # divides by one, two and three


@dataclass(frozen=True)
class Job:
    """One training: a case of METHOD_CASES, how it is wrapped, and options of TrainConfig.

    folder: of the run, so that a later job can go on from it.
    """

    case: str
    layout: str
    wrapping: str = "ddp"
    family: str = "sd_v"
    steps: int = 2
    options: Mapping[str, Any] = field(default_factory=dict)
    folder: str = ""

    @property
    def name(self) -> str:
        told = [str(v) for v in self.options.values() if not isinstance(v, bool)]
        flags = [k for k, v in self.options.items() if v is True]
        return "-".join([self.case, self.family, self.layout, *told, *flags])

    @property
    def run_folder(self) -> str:
        return self.folder or f"{self.name}-{self.wrapping}"


@dataclass(frozen=True)
class Seen:
    """What one process saw: gradients of each phase's first update, weights and logs at the end.

    facts: world_size, sharded, logs, and the bytes of parameters it held.
    """

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    facts: dict[str, Any]


def train(job: Job, teacher: Path, out: Path, world: int) -> Seen:
    """Run a job in this process, which is one of `world`."""
    os.environ["ACCELERATE_USE_FSDP"] = str(job.wrapping == "fsdp2").lower()
    os.environ["FSDP_VERSION"] = "2"
    AcceleratorState._reset_state()
    trainer = build_trainer(
        job.case,
        teacher,
        job.layout,
        out / job.run_folder,
        **{
            "max_train_steps": job.steps,
            "train_batch_size": GLOBAL_BATCH // world,
            "gradient_accumulation_steps": 2,
            "ema_decay": 0.9,
            "validation_steps": 0,
            **job.options,
        },
    )
    gradients = _watched(trainer)
    logs = trainer.train()
    bank = trainer.bank
    return Seen(
        gradients,
        {
            f"{role}/{name}": value
            for role in bank.roles
            if bank.members(role)
            for name, value in bank.role_state(role).items()
        },
        {
            name: value
            for role in bank.trained_roles
            for name, value in to_cpu(optimizer_state(bank, trainer.optimizer, role)).items()
        },
        {
            "world_size": trainer.accelerator.num_processes,
            "sharded": trainer.sharded,
            "logs": logs,
            "bytes": sum(_local(p).nbytes for p in bank.parameters()),
        },
    )


def _local(value: Any) -> Tensor:
    local: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return local


def _watched(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """A dict that fills with the gradients of each role's first update, by role and parameter."""
    found: dict[str, Tensor] = {}
    step = trainer.optimizer.step

    def recording() -> None:
        for role in trainer.bank.trained_roles:
            new = {
                f"{role}/{name}": full_tensor(param.grad).clone()
                for name, param in trainer.bank.members(role).items()
                if param.grad is not None
            }
            if not any(name.startswith(f"{role}/") for name in found):
                found.update(new)
        step()

    trainer.optimizer.step = recording
    return found


def alone(job: Job, teacher: Path, out: Path) -> Seen:
    """The job in this process alone, with the whole global batch; leaves no trace of itself."""
    kept = {name: os.environ.get(name) for name in ("ACCELERATE_USE_FSDP", "FSDP_VERSION")}
    try:
        return train(Job(**{**asdict(job), "wrapping": "one"}), teacher, out, 1)
    finally:
        AcceleratorState._reset_state()
        for name, value in kept.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class Group:
    """Every job on `world` gloo processes, started at once; `seen` waits for them.

    torchrun does the same with one more process, which takes seconds to start.
    Args: runs: where the jobs' run folders are, if not in `out`. cpu: on the CPU, else one GPU
        each, from a process that has touched none.
    """

    def __init__(
        self,
        world: int,
        jobs: Sequence[Job],
        teachers: Mapping[str, Path],
        out: Path,
        runs: Path | None = None,
        cpu: bool = True,
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self._out, self._jobs = out, jobs
        work = partial(_train_all, jobs, teachers, out, runs or out, world)
        place = {"ACCELERATE_USE_CPU": str(cpu).lower()}
        self._processes = forked_ranks(world, work, out, limit_s=3600, **place)

    def seen(self, timeout: float = 280) -> list[list[Seen]]:
        """By job, then by rank. Fails where a process fails, and ends the others."""
        ends = time.monotonic() + timeout
        codes: dict[int, int] = {}
        while len(codes) < len(self._processes) and not any(codes.values()):
            time.sleep(0.05)
            late = signal.SIGKILL if time.monotonic() > ends else 0
            codes |= _ended(set(self._processes) - set(codes), late)
        codes |= _ended(set(self._processes) - set(codes), signal.SIGKILL, wait=True)
        statuses = [codes[process] for process in self._processes]
        texts = [(self._out / f"rank{r}.txt").read_text() for r in range(len(statuses))]
        first = next((t for t, code in zip(texts, statuses, strict=True) if code), texts[0])
        assert not any(statuses), f"exit codes {statuses}: {first[-4000:]}"
        ranks = range(len(statuses))
        return [[seen_by(self._out, i, rank) for rank in ranks] for i in range(len(self._jobs))]


def _ended(processes: set[int], kill: int, wait: bool = False) -> dict[int, int]:
    """Statuses of those that have ended. Args: kill: the signal that all get, 0 for none."""
    codes = {}
    for number in processes:
        if kill:
            os.kill(number, kill)
        done, status = os.waitpid(number, 0 if wait else os.WNOHANG)
        if done:
            codes[number] = os.waitstatus_to_exitcode(status)
    return codes


_PARTS = ("gradients", "weights", "optimizer")


def seen_by(out: Path, index: int, rank: int) -> Seen:
    """What one process saw of one job, as it wrote it down."""
    tensors = [load_file(out / f"{index}-{rank}-{part}.safetensors") for part in _PARTS]
    return Seen(*tensors, json.loads((out / f"{index}-{rank}.json").read_text()))


def largest(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The largest difference of tensors of the same names."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())[:4]
    return max(float((one[name] - other[name]).abs().max()) for name in one if one[name].numel())


def gradient_error(one: Seen, other: Seen) -> float:
    """The largest difference of gradients, as a part of the largest gradient of their role."""
    worst = 0.0
    for role in {name.split("/")[0] for name in one.gradients}:
        own = [
            {k: v for k, v in seen.gradients.items() if k.startswith(f"{role}/")}
            for seen in (one, other)
        ]
        scale = max(float(v.abs().max()) for v in own[0].values())
        worst = max(worst, largest(*own) / scale)
    return worst


def equal(one: Seen, other: Seen) -> bool:
    """Whether two processes hold the same bits: weights, gradients, optimiser and logs."""
    pairs = [(getattr(one, part), getattr(other, part)) for part in _PARTS]
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
        for mine, theirs in pairs
    )


def _train_all(
    jobs: Sequence[Job],
    teachers: Mapping[str, Path],
    out: Path,
    runs: Path,
    world: int,
    rank: int,
) -> None:
    for index, job in enumerate(jobs):
        seen = train(job, teachers[job.family], runs, world)
        for part in _PARTS:
            tensors = {name: value.contiguous() for name, value in getattr(seen, part).items()}
            save_file(tensors, out / f"{index}-{rank}-{part}.safetensors")
        (out / f"{index}-{rank}.json").write_text(json.dumps(seen.facts))
