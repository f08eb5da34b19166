"""What a run says first and last: five lines of what will happen, and how to try the result."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepdistill.cache.precompute import gib
from stepdistill.monitoring.run_report import REPORT
from stepdistill.training.optim import moment_bytes

if TYPE_CHECKING:
    from stepdistill.training.trainer import Trainer


def opening_lines(trainer: Trainer) -> list[str]:
    """Teacher; method and settings; what is trained; memory; where the report is."""
    return [
        f"teacher: {_teacher(trainer)}",
        f"method:  {_method(trainer)}",
        f"trained: {_trained(trainer)}",
        f"memory:  {_memory(trainer)}",
        f"report:  {Path(trainer.args.output_dir) / REPORT}, written while it runs",
    ]


def _millions(count: float) -> str:
    return f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.2g} M"


def _teacher(trainer: Trainer) -> str:
    family = trainer.family
    count = sum(p.numel() for p in family.net.parameters())
    setting = trainer.method.setting
    px = " x ".join(map(str, family.image_size(trainer.args.resolution)))
    return (
        f"{trainer.facts['model'] or 'in memory'}, {type(family.pipeline).__name__} of "
        f"{_millions(count)} parameters at {px} px, predicts {setting.kind}"
    )


def _method(trainer: Trainer) -> str:
    """With the options that differ from the method's own, and what the rest comes from."""
    method, args = trainer.method, trainer.args
    defaults = type(method.config)()
    changed = {
        name: value
        for name, value in method.config.model_dump().items()
        if value != defaults.model_dump()[name]
    }
    told = ", ".join(f"{name} {value}" for name, value in changed.items())
    steps, world = method.sampler().num_steps, trainer.accelerator.num_processes
    samples = args.train_batch_size * args.gradient_accumulation_steps * world
    rates = {"student": args.learning_rate, **args.role_learning_rates}
    return (
        f"{method.name} ({type(method).paper}) for {steps} step{'s' * (steps > 1)}, guidance "
        f"{method.teacher_guidance:g}; {samples} sample{'s' * (samples > 1)} an update, learning "
        f"rates {', '.join(f'{role} {rate:g}' for role, rate in rates.items())}; set by you: "
        f"{told or 'nothing'}; the rest: the method's defaults"
    )


def _trained(trainer: Trainer) -> str:
    bank, args, parts = trainer.bank, trainer.args, []
    for role in bank.trained_roles:
        count = sum(p.numel() for p in bank.members(role).values())
        kind = "head" if role in bank.heads else getattr(args.tuning, role, args.tuning.student)
        shape = f"LoRA of rank {args.tuning.rank}" if kind == "lora" else kind
        parts.append(f"{role} ({shape}, {_millions(count)} parameters)")
    until = f"{args.max_train_steps} steps"
    if args.max_train_seconds is not None:
        until += f" or {args.max_train_seconds:g} s, whichever comes first"
    return f"{', '.join(parts)}; {until}"


def _memory(trainer: Trainer) -> str:
    """What is held now, and what the first update adds for certain; activations are forecast by
    `stepdistill plan`, as they depend on the batch and the method."""
    bank = trainer.bank
    encoders = (p for p in trainer.family.pipeline.components.values() if hasattr(p, "parameters"))
    held = _size([*bank.parameters(), *(p for part in encoders for p in part.parameters())])
    own = [p for role in bank.trained_roles for p in bank.members(role).values()]
    moments = sum(moment_bytes(p, trainer.args.optimizer) for p in own)
    told = (
        f"{gib(held)} of weights held; forecast {gib(held + moments + _size(own))} "
        "with gradients and optimiser, activations come on top (stepdistill plan)"
    )
    if trainer.device.type == "cuda":
        room = torch.cuda.get_device_properties(trainer.device).total_memory
        told += f"; the device has {gib(room)}"
    return told


def _size(tensors: Iterable[Any]) -> int:
    """Bytes; a tensor that is shared counts once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def closing_line(trainer: Trainer, folder: Path) -> str:
    """The one command that tries an exported pipeline."""
    family, prompts = trainer.family, trainer.args.validation_prompts
    if family.reads_image:
        return f"try it: the code in {folder / 'README.md'} (it reads a first frame)"
    example = {"prompt": "a photo of a cat", "label": "0", "none": "0"}[family.conditioning]
    prompt = prompts[0] if prompts else example
    return f"try it: stepdistill sample {shlex.quote(str(folder))} --prompt {shlex.quote(prompt)}"
