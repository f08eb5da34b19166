"""Carrying: the networks of a RoleBank as they are but for one, which carries an adapter."""

# Shapes: B batch, C channels, *S spatial, K heads.

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Nets, Scorer


class Carrying:
    """See Nets.carrying. Args: denoiser: in the place of `role`."""

    def __init__(self, nets: Nets, role: str, denoiser: Denoiser) -> None:
        self._nets, self._role, self._denoiser = nets, role, denoiser

    def __getitem__(self, role: str) -> Denoiser:
        return self._denoiser if role == self._role else self._nets[role]

    def head(self, role: str, features: Mapping[str, Tensor]) -> Tensor:
        """See Nets.head: (B, K)."""
        return self._nets.head(role, features)

    def images(self, latents: Tensor) -> Tensor:
        """See Nets.images: (B, 3, H, W) of latents (B, C, *S)."""
        return self._nets.images(latents)

    def scorer(self, name: str) -> Scorer:
        """See Nets.scorer."""
        return self._nets.scorer(name)

    def ema_update(self, role: str, decay: float) -> None:
        """See Nets.ema_update."""
        self._nets.ema_update(role, decay)

    def mix(self, role: str, other: str, share: float) -> None:
        """See Nets.mix."""
        self._nets.mix(role, other, share)

    def carrying(self, role: str, other: str, share: float) -> Nets:
        """See Nets.carrying."""
        return self._nets.carrying(role, other, share)
