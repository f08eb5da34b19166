"""Weights of one role out of the networks and back: the one place that reads and writes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def to_cpu(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CPU copies of the tensors, contiguous and apart from the live ones."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in own.items()}


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
        mine.copy_(value)
