"""Flux's guidance embedding: telling it, and folding one fixed guidance into the weights.

It and the time embedding are MLPs whose outputs are added. Flux.1's have biases, so the constant
goes into the last one of the other: a stock transformer without guidance input, exact. Flux.2's
have none, so the embedding itself is made constant: its first layer reads a fixed projection v of
the sinusoid p(g) with v p(g) = 1 for every guidance a call may give, to 1e-5 in float32.
"""

# Shapes: B batch, S width of the sinusoid.

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stepdistill.families.family import Family

EMBEDDER, BIAS = "guidance_embedder", "timestep_embedder.linear_2.bias"
MAX_GUIDANCE = 20.0  # the constant holds from 0 to here
RIDGE = 1e-10  # keeps v short (norm 0.55 at width 256), or half precision would lose it
MAX_DEVIATION = 1e-3  # of v p(g) from 1: narrow sinusoids can't be made constant


class GuidanceToldFamily(Family):
    """Families whose network may be told the guidance; without any it is told 1."""

    supports_w: ClassVar[bool] = True

    @property
    def embeds_guidance(self) -> bool:
        """See Family.embeds_guidance: true of the dev checkpoints."""
        return self.told_guidance_in(self.config)

    @classmethod
    def told_guidance_in(cls, config: Any) -> bool:
        """See Family.told_guidance_in: dev's input serves, schnell can have none."""
        return bool(config.get("guidance_embeds"))

    def copy_net(self, extra_inputs: Sequence[str] = (), net: nn.Module | None = None) -> nn.Module:
        """A copy of the transformer; ("w",) is an input that dev has already."""
        has_w = tuple(extra_inputs) == ("w",) and self.embeds_guidance
        return super().copy_net(() if has_w else extra_inputs, net)

    def embedded_guidance(self, model_t: Tensor, w: Tensor | None) -> Tensor | None:
        """(B,) the network's guidance input, w + 1; None where it has none."""
        if not self.embeds_guidance:
            self.refuse_w(w)
            return None
        return torch.ones_like(model_t, dtype=torch.float32) if w is None else w.float() + 1


@torch.no_grad()
def fold_guidance(net: Any, guidance: float) -> nn.Module:
    """A Flux.1 transformer without guidance input that answers as `net` told `guidance`."""
    embedder = net.time_text_embed
    model_guidance = torch.full((1,), guidance, device=net.device, dtype=net.dtype) * 1000
    constant = embedder.guidance_embedder(embedder.time_proj(model_guidance).to(net.dtype))[0]
    prefix = "time_text_embed."
    state = {k: v for k, v in net.state_dict().items() if not k.startswith(prefix + EMBEDDER)}
    state[prefix + BIAS] = state[prefix + BIAS] + constant
    folded: nn.Module = type(net).from_config(net.config, guidance_embeds=False)
    folded.load_state_dict(state)
    return folded.to(device=net.device, dtype=net.dtype).eval().requires_grad_(False)


@torch.no_grad()
def fix_guidance(net: Any, guidance: float) -> nn.Module | None:
    """A copy of a Flux.2 transformer that answers as `net` told `guidance`, whatever it is told.

    None where the sinusoid is too narrow for that.
    """
    embedder = net.time_guidance_embed
    unit = constant_projection(embedder.time_proj)
    if unit is None:
        return None
    fixed: Any = copy.deepcopy(net)
    first = fixed.time_guidance_embed.guidance_embedder.linear_1.weight
    wanted = first.float() @ embedder.time_proj(torch.tensor([1000.0 * guidance]))[0].to(first)
    first.copy_(wanted[:, None] * unit.to(wanted)[None, :])
    return fixed.eval().requires_grad_(False)


def constant_projection(time_proj: Any) -> Tensor | None:
    """v (S,) float64 with v p(1000 g) = 1 for g from 0 to MAX_GUIDANCE; None where there is none.

    Ridge regression on a grid finer than the fastest sinusoid.
    """
    guidances = torch.linspace(0.0, MAX_GUIDANCE, 8001)
    rows = time_proj(1000.0 * guidances).double()
    ones = rows.new_ones(len(rows))
    gram = rows.T @ rows / len(rows) + RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype)
    projection = torch.linalg.solve(gram, rows.T @ ones / len(rows))
    deviation = float((rows @ projection - 1.0).abs().max())
    return projection if deviation < MAX_DEVIATION else None
