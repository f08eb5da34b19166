"""Ctx: the only source of randomness and of run position that a loss may use.

Draws are keyed by (seed, step, phase, repeat, micro-batch), so a resumed run repeats them exactly.
Per-sample draws are made for the global batch and sliced by rank: N processes see the very numbers
that one process with the same global batch would see.
"""

# Shapes: B local batch.

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text; the same on every machine and run."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass
class Ctx:
    """Position and randomness of one loss evaluation.

    step: student updates done so far. max_steps: their planned number.
    repeat, micro: which repeat of the phase, which micro-batch of the accumulation window.
    carry: detached values one phase leaves for a later one of the same step and micro-batch.
    mean_over_ranks: mean of a tensor over processes (the identity on one process).
    """

    seed: int = 0
    step: int = 0
    max_steps: int = 1
    phase: str = ""
    repeat: int = 0
    micro: int = 0
    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    carry: dict[str, object] = field(default_factory=dict)
    mean_over_ranks: Callable[[Tensor], Tensor] = _identity

    def _key(self) -> tuple[object, ...]:
        return (self.seed, self.step, self.phase, self.repeat, self.micro)

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(stable_seed("sample", *self._key()))

    @cached_property
    def _shared(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(stable_seed("shared", *self._key()))

    def _rows(self, x: Tensor) -> Tensor:
        return x.chunk(self.world_size)[self.rank] if self.world_size > 1 else x

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, ...) float32 on the run's device; rows differ between ranks."""
        full = (shape[0] * self.world_size, *shape[1:])
        return self._rows(torch.randn(full, generator=self._generator, device=self.device))

    def rand(self, bsz: int) -> Tensor:
        """Uniform [0, 1) (B,) float64."""
        return self._rows(
            torch.rand(
                bsz * self.world_size,
                generator=self._generator,
                device=self.device,
                dtype=torch.float64,
            )
        )

    def between(self, bounds: tuple[float, float], bsz: int) -> float | Tensor:
        """Uniform between the bounds, (B,) float64, or the number where they are equal."""
        low, high = bounds
        return low if low == high else low + (high - low) * self.rand(bsz)

    def stratified(self, bsz: int) -> Tensor:
        """Uniform [0, 1) (B,) float64, one draw in each of the global batch's equal strata.

        Each sample alone is uniform; together they cover the range, so a mean over times has less
        variance. Source: Kingma et al. 2021 (VDM), arXiv:2107.00630, Appendix I.1.
        """
        count, own = bsz * self.world_size, self._generator
        order = torch.randperm(count, device=self.device, generator=own)
        jitter = torch.rand(count, device=self.device, dtype=torch.float64, generator=own)
        return self._rows((order + jitter) / count)

    def randint(self, low: int, high: int, bsz: int) -> Tensor:
        """Uniform integers in [low, high), (B,) int64."""
        return low + (self.rand(bsz) * (high - low)).long().clamp_max(high - low - 1)

    def shared_randint(self, low: int, high: int) -> int:
        """One integer in [low, high), the same on every rank: the same graph everywhere."""
        return int(torch.randint(low, high, (1,), generator=self._shared).item())

    def shared_rand(self) -> float:
        """One uniform number in [0, 1), the same on every rank."""
        return float(torch.rand(1, generator=self._shared, dtype=torch.float64).item())

    def host_rand(self, bsz: int) -> Tensor:
        """As `rand`, on the CPU: for choices that tensors kept there must follow."""
        count = bsz * self.world_size
        return self._rows(torch.rand(count, generator=self._shared, dtype=torch.float64))

    def times(self, t: float, bsz: int) -> Tensor:
        """(B,) float64 filled with t on the run's device."""
        return torch.full((bsz,), t, dtype=torch.float64, device=self.device)
