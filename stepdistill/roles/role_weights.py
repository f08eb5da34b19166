"""Weights of one role out of the networks and back: the one place that copies and checks them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from stepdistill.loading.stored_tensors import StoredTensors


def full_tensor(value: Tensor) -> Tensor:
    """The tensor itself, or all of one in shards (then call on every process, in one order)."""
    full: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return full


def local_tensor(value: Tensor) -> Tensor:
    """The tensor itself, or this process's part of one in shards.

    What is done value by value is done there: DTensor's own way looks for a placement of each
    tensor anew, milliseconds for each of thousands.
    """
    local: Tensor = value.to_local() if isinstance(value, DTensor) else value
    return local


def to_cpu(live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies of the tensors, contiguous and apart from the live ones."""
    return {k: full_tensor(v.detach()).cpu().contiguous().clone() for k, v in live.items()}


@torch.no_grad()
def copy_into(
    live: Mapping[str, Tensor], state: Mapping[str, Tensor] | StoredTensors, whose: str
) -> None:
    """Copy saved tensors over live ones; stored ones over live ones in shards, too.

    Errors: ValueError naming what is missing, unexpected, or of another shape or kind.
    """
    if isinstance(state, StoredTensors):
        saved = state.facts
    else:
        saved = {name: (tuple(value.shape), value.dtype) for name, value in state.items()}
    if set(live) != set(saved):
        missing, extra = sorted(set(live) - set(saved))[:3], sorted(set(saved) - set(live))[:3]
        raise ValueError(
            f"{whose}: expected the saved tensors of this layout, got missing {missing} "
            f"and unexpected {extra}. Was it saved with another tuning or target_modules?"
        )
    for name, (shape, dtype) in saved.items():
        mine = live[name]
        # copy_ would spread a smaller tensor and round integers without a word.
        if (shape, dtype.is_floating_point) != (tuple(mine.shape), mine.is_floating_point()):
            raise ValueError(
                f"{whose}: expected {name} of {tuple(mine.shape)} {mine.dtype}, got "
                f"{shape} {dtype}."
            )
    if isinstance(state, StoredTensors):
        state.read_into(live)
        return
    for name, value in state.items():
        live[name].copy_(value)
