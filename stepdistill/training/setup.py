"""What a run is made of before its loop starts: the accelerator, and the networks by role."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs

from stepdistill.core.method import Method, Role, Scorer
from stepdistill.models.decoder import load_decoder
from stepdistill.models.family import Family
from stepdistill.models.rolebank import RoleBank
from stepdistill.training.config import TrainConfig
from stepdistill.training.start import start_student
from stepdistill.training.step import place


def make_accelerator(args: TrainConfig) -> Accelerator:
    """The Accelerator of a run: one wrapped module, phases that train different parts of it.

    Errors: ValueError under a launcher's FSDP, DeepSpeed or Megatron-LM.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"accelerate: expected one process or DDP, got {name} (which shards the base that "
                "all roles share; it has not been shown to give the same gradients). Launch with "
                "configs/accelerate/ddp.yaml, and save memory with LoRA roles, "
                "--gradient_checkpointing and --offload_encoders."
            )
    return Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.report_to or None,
        project_dir=args.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
            # A weight cast under no_grad and kept would cost the student its gradient.
            AutocastKwargs(cache_enabled=False),
        ],
    )


def roles_of(method: Method[Any], args: TrainConfig) -> dict[str, Role]:
    """The method's roles, and the run's averaged student where it keeps one."""
    roles = dict(method.roles())
    if args.ema_decay:
        roles["ema"] = Role(ema_of="student", extra_inputs=roles["student"].extra_inputs)
    return roles


def make_bank(
    family: Family,
    method: Method[Any],
    args: TrainConfig,
    device: torch.device,
    scorers: Mapping[str, Scorer],
) -> RoleBank:
    """The method's networks on `device`, with the run's averaged student, started as args say."""
    roles = roles_of(method, args)
    decoder = None
    if args.decoder is not None and scorers:
        decoder = load_decoder(args.decoder, family.sample_shape()[0], device)
    elif args.decoder is not None:
        warnings.warn(
            f"decoder {args.decoder!r} has no effect: no loss of this run judges images.",
            stacklevel=3,
        )
    bank = RoleBank(family, roles, args.tuning, scorers, decoder)
    if args.init_student_from is not None:
        start_student(bank, args.init_student_from)
    place(bank, args, device)
    if args.gradient_checkpointing:
        bank.enable_gradient_checkpointing()
    return bank
