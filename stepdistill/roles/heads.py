"""Discriminator heads on a denoiser's hidden states: one logit per head and sample.

Size-agnostic forms of DMD2's head (Yin et al. 2024, arXiv:2405.14867, released code: strided 4x4
convolutions, GroupNorm, SiLU down to one logit). Differs from the release: the spatial mean
replaces the last strides, so one head fits every resolution; tokens use a per-token MLP.
"""

# Shapes: B batch, D width, H, W spatial, N tokens, K blocks.

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Block(Protocol):
    """What a head must know of a feature block (models.family.FeatureBlock)."""

    @property
    def dim(self) -> int: ...
    @property
    def layout(self) -> str: ...


def _groups(channels: int) -> int:
    return next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)


class MapHead(nn.Module):
    """(B, D, H, W) -> (B, 1) logit; two strided convolutions where the map is large enough."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(dim, dim, 4, stride=2, padding=2),
            nn.GroupNorm(_groups(dim), dim),
            nn.SiLU(),
            nn.Conv2d(dim, dim, 4, stride=2, padding=2),
            nn.GroupNorm(_groups(dim), dim),
            nn.SiLU(),
        )
        self.out = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.body(x).mean(dim=(2, 3)))
        return out


class TokenHead(nn.Module):
    """(B, N, D) -> (B, 1) logit: LayerNorm and a two-layer MLP per token, then the mean."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU()
        )
        self.out = nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.body(x).mean(dim=1))
        return out


class Heads(nn.Module):
    """Blocks' features -> (B, K) logits, `per_block` of each block, neighbours together."""

    def __init__(self, heads: Sequence[nn.Module], per_block: int = 1) -> None:
        super().__init__()
        self.heads, self.per_block = nn.ModuleList(heads), per_block

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        dtype = next(self.parameters()).dtype
        each = [f.to(dtype) for f in features for _ in range(self.per_block)]
        logits = [head(f) for head, f in zip(self.heads, each, strict=True)]
        return torch.cat(logits, dim=1)


def make_head(blocks: Sequence[Block], per_block: int = 1) -> Heads:
    """That many heads for each block, by its layout."""
    each = [b for b in blocks for _ in range(per_block)]
    heads = [MapHead(b.dim) if b.layout == "map" else TokenHead(b.dim) for b in each]
    return Heads(heads, per_block)
