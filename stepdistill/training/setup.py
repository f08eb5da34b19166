"""What a run is made of before its loop starts: the accelerator, and the networks by role."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs

from stepdistill.config.run import TrainConfig
from stepdistill.core.method import Method, Role, Scorer
from stepdistill.families.decoder import load_decoder
from stepdistill.families.family import Family
from stepdistill.roles.rolebank import RoleBank
from stepdistill.training.memory import (
    checkpoint_decoder,
    checkpoints_activations,
    compile_blocks,
)
from stepdistill.training.optim import build_optimizer
from stepdistill.training.sharding import check_sharding, shard, sharding_asked, without_plugin
from stepdistill.training.start import load_student_base, start_student, student_base_of
from stepdistill.training.step import TrainStep, place


def make_accelerator(args: TrainConfig) -> Accelerator:
    """The Accelerator of a run: one wrapped module, phases that train different parts of it.

    Errors: ValueError under a launcher's DeepSpeed, Megatron-LM or first version of FSDP, for
    settings that FSDP2 does not serve, and for fp16 on a device that Accelerate ignores it on.
    """
    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true", "yes"):
            raise ValueError(
                f"accelerate: expected one process, DDP or FSDP2, got {name} (it takes one model "
                "with one optimiser, not roles that share a base). Launch with "
                "configs/accelerate/fsdp2.yaml or ddp.yaml."
            )
    if sharding_asked():
        check_sharding(args)
    with without_plugin():
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            log_with=args.report_to or None,
            project_dir=args.output_dir,
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
                # A weight cast under no_grad and kept would cost the student its gradient.
                AutocastKwargs(cache_enabled=False),
            ],
        )
    if args.mixed_precision == "fp16" and accelerator.scaler is None:
        raise ValueError(
            f"mixed_precision: expected no or bf16 on {accelerator.device.type}, got fp16 "
            "(Accelerate ignores it there, its gradient scaler too). Set --mixed_precision bf16."
        )
    return accelerator


def prepared(
    accelerator: Accelerator, bank: RoleBank, args: TrainConfig, training: bool
) -> tuple[Any, Any]:
    """The one wrapped module (DDP, or in shards where the launcher asks for FSDP2), and its
    optimiser. What is made to export is not wrapped: one process may do it alone."""
    step = TrainStep(bank)
    in_shards = sharding_asked() and accelerator.num_processes > 1
    if training and not in_shards:
        module, optimizer = accelerator.prepare(step, build_optimizer(bank, args))
        return module, optimizer
    if training:
        shard(step, accelerator.device)
    module = accelerator.prepare_model(step, evaluation_mode=True)  # autocast, and no DDP
    return module, accelerator.prepare(build_optimizer(bank, args))


def roles_of(method: Method[Any], args: TrainConfig) -> dict[str, Role]:
    """The method's roles, the run's averaged student where it keeps one, and the teacher where
    validation draws its samples (a method that learns from pairs has none)."""
    roles = dict(method.roles())
    if args.validation_steps and args.validation_teacher_steps:
        roles.setdefault("teacher", Role())
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
    # Heads on a pixel network that a run without data (an export) did not build train no more.
    asked = roles_of(method, args).items()
    roles = {name: role for name, role in asked if not role.reads or role.reads in scorers}
    decoder = None
    if args.decoder is not None and scorers:
        decoder = load_decoder(args.decoder, family.sample_shape()[0], device)
    elif scorers:
        checkpoint_decoder(args, family)
    elif args.decoder is not None:
        warnings.warn(
            f"decoder {args.decoder!r} has no effect: no loss of this run judges images.",
            stacklevel=3,
        )
    source, own_base = student_base_of(args), None
    if source is not None:
        if sharding_asked():
            raise ValueError(
                f"init_student_from: expected no shards with a LoRA student on {source!r}, got "
                "them. Train with DDP, or a full student."
            )
        own_base = load_student_base(family, source, args.frozen_dtype).to(device)
    bank = RoleBank(family, roles, args.tuning, scorers, decoder, own_base)
    if args.init_student_from is not None and source is None:
        start_student(bank, args.init_student_from)
    # Weights that will be in shards reach the device block by block.
    place(bank, args, device, torch.device("cpu") if sharding_asked() else device)
    if args.compile:
        compile_blocks(bank, args.compile_backend)
    if checkpoints_activations(args, bank.family.net):  # around what is compiled, not within
        bank.enable_gradient_checkpointing()
    return bank
