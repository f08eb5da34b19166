"""TrainStep: the one module Accelerate prepares. Its forward evaluates one phase's loss.

All roles and heads live inside it, so a single wrapped module serves DDP and FSDP2 whatever roles a
phase trains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepdistill.core.context import Ctx
from stepdistill.core.method import Loss
from stepdistill.core.types import Batch
from stepdistill.models.rolebank import RoleBank
from stepdistill.training.config import TrainConfig

_DTYPES = {
    "no": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


class TrainStep(nn.Module):
    """Calls a phase's loss with the bank's networks."""

    def __init__(self, bank: RoleBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, loss: Loss, batch: Batch, ctx: Ctx) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss in float32, detached scalars to log)."""
        losses = loss(self.bank, batch, ctx)
        return losses.total.float(), {name: v.detach() for name, v in losses.logs.items()}


def place(bank: RoleBank, args: TrainConfig, device: torch.device) -> None:
    """Move the pipeline to the device, its frozen denoiser weights to tuning.base_dtype.

    Trained and averaged weights stay float32.
    """
    name = args.tuning.base_dtype
    dtype = _DTYPES[args.mixed_precision if name == "auto" else name]
    own = {id(p) for role in bank.roles for p in bank.members(role).values()}
    for param in bank.family.net.parameters():
        if id(param) not in own:
            param.data = param.data.to(dtype)
    bank.family.pipeline.to(device)
