"""Flux's guidance embedding of one fixed guidance, folded into its time embedding.

Both are MLPs whose outputs are added, so the constant goes into the last bias of the other. What
remains is a stock transformer without guidance input, exact, and free of guidance_scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

EMBEDDER, BIAS = "guidance_embedder", "timestep_embedder.linear_2.bias"


@torch.no_grad()
def fold_guidance(net: Any, guidance: float) -> nn.Module:
    """A transformer without guidance input that answers as `net` told `guidance`."""
    embedder = net.time_text_embed
    told = torch.full((1,), guidance, device=net.device, dtype=net.dtype) * 1000
    constant = embedder.guidance_embedder(embedder.time_proj(told).to(net.dtype))[0]
    prefix = "time_text_embed."
    state = {k: v for k, v in net.state_dict().items() if not k.startswith(prefix + EMBEDDER)}
    state[prefix + BIAS] = state[prefix + BIAS] + constant
    folded: nn.Module = type(net).from_config(net.config, guidance_embeds=False)
    folded.load_state_dict(state)
    return folded.to(device=net.device, dtype=net.dtype).eval().requires_grad_(False)
