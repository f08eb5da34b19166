"""LCM's guidance input of a stock UNet (Luo et al. 2023, arXiv:2310.04378, Sec. 4.3).

The UNet's own `timestep_cond`: a sinusoid of 1000 w through a bias-free projection that is added
to the time embedding. w is guidance in LCM's convention, w = g - 1.
"""

# Shapes: B batch, D width of the sinusoid.

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

GUIDANCE_EMBED_DIM = 256  # D of LCM's released models


def guidance_embedding(w: Tensor, dim: int) -> Tensor:
    """(B, D) float32 from w (B,), as `get_guidance_scale_embedding` of the stock pipelines."""
    half = dim // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)  # float32, for bit-equal angles
    freqs = torch.exp(torch.arange(half, dtype=torch.float32, device=w.device) * -step.to(w.device))
    angles = (w * 1000.0).float()[:, None] * freqs[None, :]
    emb = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(emb, (0, dim % 2))


def timestep_cond(dim: int | None, w: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B, D) for the UNet's input of that width; None without w.

    Errors: ValueError for w with a UNet that has no such input (dim None).
    """
    if w is None:
        return None
    if dim is None:
        raise ValueError(
            "unet: expected time_cond_proj_dim in its config to read w, got none. "
            'Give the role extra_inputs ("w",).'
        )
    return guidance_embedding(w, dim).to(dtype)


def idle_guidance_input(net: Any) -> bool:
    """Whether the UNet's guidance input goes through zeros, as in our exports: it is told nothing.

    Such a UNet as a teacher is guided by a null pass, as if it had no such input.
    """
    weight: Tensor = net.time_embedding.cond_proj.weight
    return not weight.is_meta and not bool(weight.any())


def with_guidance_input(net: Any) -> nn.Module:
    """A copy of a stock UNet that reads w, through a projection that starts at zero.

    Zero makes the copy answer exactly as the original before the first update, whatever w.
    """
    if net.config.time_cond_proj_dim is not None:  # an LCM teacher has the input already
        twin: nn.Module = copy.deepcopy(net)
        return twin
    guided_net: nn.Module = type(net).from_config(net.config, time_cond_proj_dim=GUIDANCE_EMBED_DIM)
    missing, unexpected = guided_net.load_state_dict(net.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"], missing
    assert not unexpected, unexpected
    nn.init.zeros_(guided_net.get_parameter("time_embedding.cond_proj.weight"))
    return guided_net.to(net.device).type(net.dtype).eval()
