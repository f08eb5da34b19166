"""Ctx: the only source of randomness and of run position that a loss may use.

Draws are keyed by (seed, step, phase, repeat, micro-batch), so a resumed run repeats them exactly.
N processes see the very numbers that one process with the same global batch would see: draws of a
sample's shape are keyed by its index in the global batch, and a process makes its own alone; those
of one number a sample (times, strata, permutations) are made for the global batch and sliced.
"""

# Shapes: B local batch.

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

# Of a run's draws, kept in its facts. 1 (runs that name none): samples come from one draw of the
# global batch on every process.
DRAW_LAW = 2


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text; the same on every machine and run."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") & (2**63 - 1)


def normal_rows(
    shape: tuple[int, ...], seeds: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """(B, *shape) standard normal float32 on the device; row i depends on seeds[i] alone."""
    rows = torch.empty((len(seeds), *shape), device=device)
    if rows.is_meta:  # shapes and no values: nothing to seed
        return rows
    generator = torch.Generator(device)  # one for all: seeding it costs less than making it
    for row, seed in zip(rows, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return rows


def _identity(x: Tensor) -> Tensor:
    return x


@dataclass
class Ctx:
    """Position and randomness of one loss evaluation.

    step: student updates done so far. max_steps: their planned number.
    repeat, micro: which repeat of the phase, which micro-batch of the accumulation window.
    carry: detached values one phase leaves for a later one of the same step and micro-batch.
    mean_over_ranks: mean of a tensor over processes (the identity on one process).
    draw_law: see DRAW_LAW. draws: how many `randn` have been made.
    rows: samples that networks were asked about, one with gradients counted threefold.
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
    draw_law: int = DRAW_LAW
    draws: int = field(default=0, init=False)  # a replaced Ctx draws from its key's first on
    rows: int = field(default=0, init=False)

    def _key(self) -> tuple[object, ...]:
        return (self.seed, self.step, self.phase, self.repeat, self.micro)

    @cached_property
    def _generator(self) -> torch.Generator | None:
        """None on torch's meta device, where draws have shapes and no values."""
        if self.device.type == "meta":
            return None
        return torch.Generator(self.device).manual_seed(stable_seed("sample", *self._key()))

    @cached_property
    def _shared(self) -> torch.Generator:
        return torch.Generator("cpu").manual_seed(stable_seed("shared", *self._key()))

    def _rows(self, x: Tensor) -> Tensor:
        return x.chunk(self.world_size)[self.rank] if self.world_size > 1 else x

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (B, ...) float32 on the run's device; rows differ between ranks.

        Each row is keyed by its index in the global batch: the cost is the local batch's.
        """
        bsz, *rest = shape
        if self.draw_law == 1:
            full = (bsz * self.world_size, *rest)
            return self._rows(torch.randn(full, generator=self._generator, device=self.device))
        key, first = ("row", *self._key(), self.draws), self.rank * bsz
        self.draws += 1
        seeds = [stable_seed(*key, index) for index in range(first, first + bsz)]
        return normal_rows(tuple(rest), seeds, self.device)

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
        count, generator = bsz * self.world_size, self._generator
        order = torch.randperm(count, device=self.device, generator=generator)
        jitter = torch.rand(count, device=self.device, dtype=torch.float64, generator=generator)
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
