"""TrainStep: the one module Accelerate prepares. Its forward evaluates one phase's loss.

All roles and heads live inside it, so a single wrapped module serves DDP and FSDP2 whatever roles a
phase trains.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stepdistill.config.run import TrainConfig
from stepdistill.core.context import Ctx
from stepdistill.core.method import Loss
from stepdistill.core.types import Batch
from stepdistill.loading.quantization import is_packed
from stepdistill.monitoring.step_signs import StepSigns
from stepdistill.roles.rolebank import RoleBank
from stepdistill.training.rewards import AddRewards


class TrainStep(nn.Module):
    """Calls a phase's loss with the bank's networks."""

    def __init__(self, bank: RoleBank) -> None:
        super().__init__()
        self.bank = bank

    def forward(
        self, loss: Loss, batch: Batch, ctx: Ctx, rewards: AddRewards | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss in float32, detached scalars to log, on the loss's device): the method's,
        that of rewards due, and signs of a collapse."""
        signs = StepSigns()
        with self.bank.watched(signs.see):
            losses = loss(self.bank, batch, ctx)
        if rewards is not None:
            with self.bank.watched(signs.count):
                losses = rewards(self.bank, batch, ctx, losses)
        ctx.rows += signs.rows
        logs = {**losses.logs, **signs.logs(batch)}
        total = losses.total.float()
        # A method may log a number of the host's: the log stacks them, on the device.
        return total, {name: v.detach().to(total.device) for name, v in logs.items()}


def place(
    bank: RoleBank, args: TrainConfig, device: torch.device, net_device: torch.device | None = None
) -> None:
    """Move the pipeline to the device, its frozen denoiser weights to tuning.base_dtype.

    Text encoders follow the denoiser: T5-XXL alone is 19 GB in float32. Trained and averaged
    weights and the autoencoder, which overflows in half precision (SDXL), stay float32. Where a
    loss judges the autoencoder's images, it is on the device whatever the text encoders are.

    Args: net_device: where the denoiser goes instead.
    """
    dtype = args.frozen_dtype
    role_params = {id(p) for role in bank.roles for p in bank.members(role).values()}
    for param in bank.family.net.parameters():
        if id(param) not in role_params and not is_packed(param):
            param.data = param.data.to(dtype)
    bank.family.place_encoders(dtype, torch.device("cpu") if args.offload_encoders else device)
    vae = getattr(bank.family.pipeline, "vae", None)
    if bank.judged_by_vae and vae is not None:
        vae.to(device)
    for net in bank.family.side_parts.values():  # called as often as the denoiser
        net.to(device, dtype)
    bank.family.net.to(device if net_device is None else net_device)
