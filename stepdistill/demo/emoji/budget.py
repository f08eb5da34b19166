"""How long the emoji teacher is trained: read by the command, so without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Pictures that each phase sees; they and the seed decide the weights."""

    autoencoder: int = 50_000
    denoiser: int = 1_200_000
    decoder: int = 40_000
    seed: int = 0
