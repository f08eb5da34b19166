"""Weights of one role out of the networks and back: the one place that reads and writes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """The tensor itself, or all of one in shards (then call on every process, in one order)."""
    full: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return full


def like(value: Tensor, mine: Tensor) -> Tensor:
    """A whole tensor as this process's part of it where `mine` is in shards, else itself."""
    if not isinstance(mine, DTensor):
        return value
    # Every process has read it, so none has to send it.
    value = value.to(mine.device)
    return distribute_tensor(value, mine.device_mesh, mine.placements, src_data_rank=None)


def to_cpu(own: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """CPU copies of the tensors, contiguous and apart from the live ones.

    Args: keep: without, only take part in gathering what is in shards; returns nothing.
    """
    copies: dict[str, Tensor] = {}
    for name, value in own.items():
        full = whole(value.detach())
        if keep:
            copies[name] = full.cpu().contiguous().clone()
    return copies


@torch.no_grad()
def copy_into(own: Mapping[str, Tensor], state: Mapping[str, Tensor], whose: str) -> None:
    """Copy saved tensors over live ones.

    Errors: ValueError naming what is missing, unexpected, or of another shape or kind.
    """
    if set(own) != set(state):
        missing, extra = sorted(set(own) - set(state))[:3], sorted(set(state) - set(own))[:3]
        raise ValueError(
            f"{whose}: expected the saved tensors of this layout, got missing {missing} "
            f"and unexpected {extra}. Was it saved with another tuning or target_modules?"
        )
    for name, value in state.items():
        mine = own[name]
        # copy_ would spread a smaller tensor and round integers without a word.
        if (value.shape, value.is_floating_point()) != (mine.shape, mine.is_floating_point()):
            raise ValueError(
                f"{whose}: expected {name} of {tuple(mine.shape)} {mine.dtype}, got "
                f"{tuple(value.shape)} {value.dtype}."
            )
        mine.copy_(like(value, mine))
