"""Discriminator heads on a denoiser's hidden states: one logit per block and sample.

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
    """K blocks' features -> (B, K) logits."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        dtype = next(self.parameters()).dtype
        logits = [head(f.to(dtype)) for head, f in zip(self.heads, features, strict=True)]
        return torch.cat(logits, dim=1)


def make_head(blocks: Sequence[Block]) -> Heads:
    """A head for each block, by its layout."""
    return Heads([MapHead(b.dim) if b.layout == "map" else TokenHead(b.dim) for b in blocks])
