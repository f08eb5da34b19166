"""Causal video networks as methods see them: how a role asks for one, and one asked for later
frames behind clean ones.

Frames of a chunk see those of chunks up to theirs (families/causal.py), and each frame is told its
own time; a clip is sampled chunk by chunk, the chunks before clean, at time 0.
"""

# Shapes: B batch, C channels, F latent frames, P of the past, H, W spatial.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.types import Cond

_INPUT = "causal:"  # of a role's extra inputs: what stands behind it is the chunk's frames


def causal_input(chunk: int) -> str:
    """The entry of Role.extra_inputs that asks for a network causal by chunks of that many latent
    frames."""
    return f"{_INPUT}{chunk}"


def chunk_of(extra_inputs: Sequence[str]) -> int | None:
    """Frames of a chunk that a role asks for; None where its network is not to be causal."""
    named = [entry.removeprefix(_INPUT) for entry in extra_inputs if entry.startswith(_INPUT)]
    return int(named[0]) if named else None


class Following(Denoiser):
    """A causal network asked for the frames (B, C, F, H, W) that follow a clean past."""

    def __init__(self, net: Denoiser, past: Tensor) -> None:
        self.net, self.past, self.path, self.kind = net, past, net.path, net.kind
        self.has_null = net.has_null

    def raw(
        self, x_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See Denoiser.raw; t: (B,), of all these frames."""
        past = self.past.repeat(len(x_t) // len(self.past), 1, 1, 1, 1)  # guidance doubles the rows
        times = t.unsqueeze(1)
        clean, noisy = (times.expand(-1, x.shape[2]) for x in (past, x_t))
        of_frames = torch.cat([torch.zeros_like(clean), noisy], dim=1)
        out, _ = self.net.raw(torch.cat([past.to(x_t), x_t], dim=2), of_frames, cond, w, ())
        return out[:, :, past.shape[2] :], {}
