"""TrainStep: the one module Accelerate prepares. Its forward evaluates one phase's loss.

All roles and heads live inside it, so a single wrapped module serves DDP and FSDP2 whatever roles a
phase trains.
"""

from __future__ import annotations

from torch import Tensor, nn

from stepdistill.core.context import Ctx
from stepdistill.core.method import Loss
from stepdistill.core.types import Batch
from stepdistill.models.rolebank import RoleBank


class TrainStep(nn.Module):
    """Calls a phase's loss with the bank's networks."""

    def __init__(self, bank: RoleBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, loss: Loss, batch: Batch, ctx: Ctx) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss in float32, detached scalars to log)."""
        losses = loss(self.bank, batch, ctx)
        return losses.total.float(), {name: v.detach() for name, v in losses.logs.items()}
