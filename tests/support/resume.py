"""Is a run that was cut off and resumed the run that was never interrupted, bit for bit?"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from stepdistill.roles.role_weights import to_cpu
from stepdistill.storage.checkpoints import newest_valid
from stepdistill.trainers import DistillationTrainer
from stepdistill.training.checkpoint import optimizer_state, plain_state
from support.runs import build_trainer

CLOCK = ("seconds", "steps_per_second")


class CutOff(Exception):
    """What ends a run here in place of a kill: nothing in memory outlives it."""


def cut_off(trainer: DistillationTrainer, update: int) -> None:
    """Train until the `update`-th optimiser update (0-based) of the run, and end before it."""
    done = 0
    going = trainer._update

    def counted(*args: Any) -> None:
        nonlocal done
        if done == update:
            raise CutOff
        done += 1
        going(*args)

    trainer._update = counted  # type: ignore[method-assign]
    try:
        trainer.train()
    except CutOff:
        return
    raise AssertionError(f"expected more than {update} updates, got {done}")


def updates_of(trainer: DistillationTrainer) -> int:
    """How many optimiser updates a run of the trainer makes."""
    steps = range(trainer.args.max_train_steps)
    return sum(phase.repeat for step in steps for phase in trainer.method.phases(step))


def everything(trainer: DistillationTrainer) -> dict[str, Any]:
    """All that two runs must agree in: weights, optimiser, the method's buffers, logs."""
    bank = trainer.bank
    found: dict[str, Any] = {
        f"weights/{role}/{name}": value
        for role in bank.roles
        if bank.members(role)
        for name, value in bank.role_state(role).items()
    }
    for role in bank.trained_roles:
        state = to_cpu(optimizer_state(bank, trainer.optimizer, role))
        found |= {f"optimizer/{name}": value for name, value in state.items()}
    found |= {f"optimizer/{k}": v for k, v in plain_state(bank, trainer.optimizer).items()}
    found |= {f"method/{k}": v.clone() for k, v in trainer.method.state_dict().items()}
    scaler = trainer.accelerator.scaler
    found["scaler"] = None if scaler is None else scaler.state_dict()
    lines = (trainer.output_dir / "log.jsonl").read_text().splitlines()
    found["logs"] = [
        {k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines
    ]
    return found


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Names of what is not the same in both, to the last bit."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        return bool(a == b)

    common = one.keys() & other.keys()
    odd = [name for name in common if not same(one[name], other[name])]
    return sorted([*odd, *(one.keys() ^ other.keys())])


def resumed_differs(
    case: str, teacher: Path, layout: str, folder: Path, seed: int = 0, **options: Any
) -> tuple[list[str], int, int]:
    """(differences, update at which it was cut off, updates of the run) of one case.

    A checkpoint is saved at every step, so what is lost is the step in work.
    """
    options = {
        "max_train_steps": 4,
        "checkpointing_steps": 1,
        "ema_decay": 0.9,
        **options,
    }
    whole = build_trainer(case, teacher, layout, folder / "whole", **options)
    total = updates_of(whole)
    whole.train()
    expected = everything(whole)
    update = random.Random(f"{seed} {case} {teacher.name} {layout}").randrange(1, total)
    cut_off(build_trainer(case, teacher, layout, folder / "cut", **options), update)
    again = build_trainer(
        case, teacher, layout, folder / "cut", resume_from_checkpoint="latest", **options
    )
    again.train()
    return differences(expected, everything(again)), update, total


def same_tensors(run: Path, other: Path) -> None:
    """Bit for bit, in all tensors of their last checkpoints."""
    states = [all_tensors(newest_valid(folder)[0]) for folder in (run, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def all_tensors(checkpoint: Path | None) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by file and name."""
    assert checkpoint is not None
    files = sorted(checkpoint.rglob("*.safetensors"))
    assert files
    return {
        f"{file.name} {name}": value for file in files for name, value in load_file(file).items()
    }
