"""One optimiser with a parameter group per role, clipping per role, and the learning-rate law.

AdamW skips parameters whose gradient is None, so phases that train different roles share it. The
learning rate is a pure function of the student step: nothing to save, nothing for Accelerate to
step num_processes times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import AdamW, Optimizer

from stepdistill.config.run import TrainConfig
from stepdistill.roles.role_weights import local_tensor
from stepdistill.roles.rolebank import RoleBank

BLOCK, SMALLEST_8BIT = 256, 4096  # of bitsandbytes' 8-bit states


def build_optimizer(bank: RoleBank, args: TrainConfig) -> Optimizer:
    """AdamW over every trained role; each group carries "role" and "base_lr".

    Errors: ValueError for role_learning_rates or role_max_grad_norm of a role nobody trains, and
    for an 8-bit optimiser without bitsandbytes or on sharded weights.
    """
    for option in ("role_learning_rates", "role_max_grad_norm"):
        unknown = sorted(set(getattr(args, option)) - set(bank.trained_roles))
        if unknown:
            raise ValueError(
                f"{option}: expected roles this method trains {bank.trained_roles}, got {unknown}."
            )
    groups = [
        {
            "params": list(bank.members(role).values()),
            "lr": args.role_learning_rates.get(role, args.learning_rate),
            "base_lr": args.role_learning_rates.get(role, args.learning_rate),
            "role": role,
        }
        for role in bank.trained_roles
    ]
    # Fused: one kernel per device instead of a Python loop over hundreds of small tensors.
    cls: Any = partial(AdamW, fused=True) if args.optimizer == "adamw" else _adamw_8bit(groups)
    optimizer: Optimizer = cls(
        groups,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    return optimizer


def _adamw_8bit(groups: list[dict[str, Any]]) -> type[Optimizer]:
    """bitsandbytes' AdamW, on CPU and CUDA (torchao's compiles for minutes on a CPU)."""
    if any(isinstance(param, DTensor) for group in groups for param in group["params"]):
        raise ValueError(
            "optimizer: expected 'adamw' on sharded weights (bitsandbytes does not read their "
            "shards), got 'adamw_8bit'."
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as err:
        raise ValueError(
            "optimizer: expected bitsandbytes for 'adamw_8bit', got none. "
            'pip install "stepdistill[quantization]"'
        ) from err
    cls: type[Optimizer] = AdamW8bit
    return cls


def state_shape(key: str, param: Tensor) -> tuple[int, ...]:
    """The shape of an entry of a parameter's optimiser state; scalars aside.

    In 8 bits a block of 256 has one scale (absmax), and a table of 256 gives the values (qmap).
    """
    if key.startswith("absmax"):
        return (math.ceil(param.numel() / BLOCK),)
    return (256,) if key.startswith("qmap") else tuple(param.shape)


def moment_bytes(param: Tensor, optimizer: str) -> int:
    """Bytes of both Adam moments of a parameter; of fewer than 4,096 numbers always in float32."""
    if optimizer == "adamw" or param.numel() < SMALLEST_8BIT:
        return 8 * param.numel()
    return 2 * (param.numel() + 4 * math.ceil(param.numel() / BLOCK))


def lr_factor(args: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """What the base learning rate is multiplied by at student step `step` (0-based).

    Under max_train_seconds a falling law follows whichever budget is used up faster, so that it
    reaches its end in both cases.
    """
    if step < args.lr_warmup_steps and args.lr_scheduler != "constant":
        return (step + 1) / args.lr_warmup_steps
    span = max(1, args.max_train_steps - args.lr_warmup_steps)
    progress = min(1.0, (step - args.lr_warmup_steps) / span)
    if args.max_train_seconds is not None:
        progress = max(progress, min(1.0, seconds / args.max_train_seconds))
    if args.lr_scheduler == "linear":
        return 1.0 - progress
    if args.lr_scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def set_learning_rate(
    optimizer: Optimizer,
    args: TrainConfig,
    step: int,
    seconds: float = 0.0,
    scale: Callable[[str], float] = lambda role: 1.0,
) -> None:
    """Set every group's learning rate for this step; scale: role -> the method's own factor."""
    factor = lr_factor(args, step, seconds)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor * scale(group["role"])


def reset_roles(bank: RoleBank, optimizer: Optimizer, roles: tuple[str, ...]) -> None:
    """Forget the optimiser state of these roles; roles that average them become copies of them."""
    for role in roles:
        for param in bank.members(role).values():
            optimizer.state.pop(param, None)
    for role, spec in bank.roles.items():
        if spec.ema_of in roles:
            bank.ema_update(role, decay=0.0)


@torch.no_grad()
def clip_by_role(
    bank: RoleBank, roles: tuple[str, ...], default: float, by_role: Mapping[str, float]
) -> dict[str, Tensor]:
    """Clip each role's gradients to its own norm; returns the norms before clipping.

    As torch.nn.utils.clip_grad_norm_; of gradients in shards on each process's parts, with one
    sum over all processes a role.
    """
    return {role: _clip(bank.members(role), by_role.get(role, default)) for role in roles}


def _clip(params: Mapping[str, Tensor], limit: float) -> Tensor:
    gradients = [param.grad for param in params.values() if param.grad is not None]
    parts = [gradient for gradient in gradients if isinstance(gradient, DTensor)]
    norm = get_total_norm([g for g in gradients if not isinstance(g, DTensor)])
    if parts:
        square = get_total_norm([local_tensor(part) for part in parts]).square()
        dist.all_reduce(square, group=parts[0].device_mesh.get_group())
        norm = (norm.to(square.device).square() + square).sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)  # always multiplied: no wait for the device
    if gradients:
        torch._foreach_mul_([local_tensor(gradient) for gradient in gradients], factor)
    return norm
