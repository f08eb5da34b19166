"""What a run says first and last: five lines of what will happen, and how to try the result."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stepdistill.cache.precompute import gib
from stepdistill.config.run import TrainConfig
from stepdistill.core.method import Method
from stepdistill.monitoring.run_report import REPORT
from stepdistill.reporting.values import counted
from stepdistill.roles.rolebank import RoleBank
from stepdistill.training.optim import moment_bytes

if TYPE_CHECKING:
    from stepdistill.training.trainer import Trainer


def opening_lines(trainer: Trainer, reasons: Sequence[str]) -> list[str]:
    """Teacher; method and settings; what is trained; memory; where the report is.

    Args: reasons: what the settings come from (see `RunConfig.reasons`).
    """
    args = trainer.args
    world, room = trainer.accelerator.num_processes, None
    if trainer.device.type == "cuda":
        room = torch.cuda.get_device_properties(trainer.device).total_memory
    return [
        teacher_line(trainer.facts["model"] or "in memory", trainer.bank, args.resolution),
        method_line(trainer.method, args, world, reasons),
        trained_line(trainer.bank, args),
        memory_line(trainer.bank, trainer.method, args, room),
        f"report:  {Path(args.output_dir) / REPORT}, written while it runs",
    ]


def _millions(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.1f} B"
    return f"{count / 1e6:,.0f} M" if count >= 1e7 else f"{count / 1e6:.2g} M"


def teacher_line(model: str, bank: RoleBank, resolution: int | None) -> str:
    """What is distilled, at which size."""
    family = bank.family
    adapters = {id(p) for role in bank.roles for p in bank.members(role).values()}
    count = sum(p.numel() for p in family.net.parameters() if id(p) not in adapters)
    return (
        f"teacher: {model}, {type(family.pipeline).__name__} of {_millions(count)} parameters at "
        f"{family.size_text(resolution)}, predicts {family.setting_at(resolution).kind}"
    )


def method_line(
    method: Method[Any], args: TrainConfig, num_processes: int, reasons: Sequence[str]
) -> str:
    """The method, the settings that matter most, and what they come from."""
    steps = method.sampler().num_steps
    samples = args.train_batch_size * args.gradient_accumulation_steps * num_processes
    rates = {"student": args.learning_rate, **args.role_learning_rates}
    return (
        f"method:  {method.name} ({type(method).paper}) for {counted(steps, 'step')}, "
        f"guidance {method.teacher_guidance:g}; {counted(samples, 'sample')} an update, "
        f"learning rates {', '.join(f'{role} {rate:g}' for role, rate in rates.items())}; "
        f"from {'; '.join(reasons)}"
    )


def trained_line(bank: RoleBank, args: TrainConfig) -> str:
    """The roles that learn, and until when."""
    parts = []
    for role in bank.trained_roles:
        count = sum(p.numel() for p in bank.members(role).values())
        kind = "head" if role in bank.heads else getattr(args.tuning, role, args.tuning.student)
        shape = f"LoRA of rank {args.tuning.rank}" if kind == "lora" else kind
        parts.append(f"{role} ({shape}, {_millions(count)} parameters)")
    until = counted(args.max_train_steps, "step")
    if args.max_train_seconds is not None:
        until += f" or {args.max_train_seconds:g} s, whichever comes first"
    return f"trained: {', '.join(parts)}; {until}"


def memory_line(
    bank: RoleBank, method: Method[Any], args: TrainConfig, room: int | None = None
) -> str:
    """What is held now, and what the first update adds for certain: gradients of its largest phase
    and moments. Activations are forecast by `stepdistill plan`.

    Args: room: bytes of the device, where that is known.
    """
    named = bank.family.pipeline.components.items()
    parts = {name: _size(part.parameters()) for name, part in named if hasattr(part, "parameters")}
    family, sides = bank.family, sum(parts[name] for name in bank.family.side_nets)
    of_calls = (*family.net_parts, *family.side_nets)
    beside = sum(size for name, size in parts.items() if name not in of_calls)
    held = _size(bank.parameters()) + sides + (0 if args.offload_encoders else beside)
    trained = {role: list(bank.members(role).values()) for role in bank.trained_roles}
    moments = sum(moment_bytes(p, args.optimizer) for tensors in trained.values() for p in tensors)
    phases = (phase for start in method.part_starts for phase in method.phases(start))
    gradients = max(sum(_size(trained[role]) for role in phase.trains) for phase in phases)
    forecast = held + moments + gradients
    text = (
        f"memory:  {gib(held)} of weights held; forecast {gib(forecast)} with gradients and "
        "optimiser; activations come on top (stepdistill plan forecasts them)"
    )
    if args.offload_encoders:
        text += f"; encoders and autoencoder on the CPU, {gib(beside)}"
    if room is None:
        return text
    if forecast > room:
        return f"{text}; MORE than the device's {gib(room)}: stepdistill plan says what saves most"
    return f"{text}; the device has {gib(room)}"


def _size(tensors: Iterable[Any]) -> int:
    """Bytes; a tensor that is shared counts once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def closing_line(trainer: Trainer, folder: Path) -> str:
    """The one command that tries an exported pipeline."""
    family, prompts = trainer.family, trainer.args.validation_prompts
    if family.needs_images():
        return f"try it: the code in {folder / 'README.md'} (it reads an image too)"
    example = {"prompt": "a photo of a cat", "label": "0", "none": "0"}[family.conditioning]
    prompt = prompts[0] if prompts else example
    return f"try it: stepdistill sample {shlex.quote(str(folder))} --prompt {shlex.quote(prompt)}"
