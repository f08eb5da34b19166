"""A UNet's ControlNet in one of its calls, and tensors in the precision that it has."""

# Shapes: B batch, C channels, H, W in px.

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.families.family import net_dtype


def at_dtype(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors, also those in a dictionary or a sequence, in that dtype."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: at_dtype(one, dtype) for name, one in value.items()}
    return [at_dtype(one, dtype) for one in value] if isinstance(value, list | tuple) else value


def unet_residuals(
    controlnet: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    control: Tensor,
    scale: float = 1.0,
) -> dict[str, Any]:
    """What a UNet called with args (x_t, t) and kwargs is told of its ControlNet.

    Args: control: (B, C, H, W), by default colours in [0, 1]. scale: of the residuals.
    """
    dtype, (x_t, time) = net_dtype(controlnet), args[:2]
    names = ("encoder_hidden_states", "added_cond_kwargs")
    text = at_dtype({name: kwargs.get(name) for name in names}, dtype)
    down, mid = controlnet(
        x_t.to(dtype),
        time,
        **text,
        controlnet_cond=control.to(dtype),
        conditioning_scale=scale,
        return_dict=False,
    )
    return {
        "down_block_additional_residuals": at_dtype(down, x_t.dtype),
        "mid_block_additional_residual": mid.to(x_t.dtype),
    }
