"""The three values that travel between data, family and method: Cond, Batch, Losses.

A method never looks inside a Cond; only the family that made it knows the keys.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W), N tokens, D width.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

ON_HOST = ("length", "text", "null_length", "imageless")
CONDITIONING, MASK = "conditioning", "mask"  # an item's images beside the one it becomes
EASIER = "easier"  # the conditioning image with more of that one left in it
DRAWN_BY = "drawn_by"  # the image by whose content the random numbers of another are drawn


@dataclass(frozen=True)
class Cond:
    """Conditioning of a batch: named tensors whose first dimension is the batch.

    Args: tensors: name -> (B, ...); every tensor has the same B. Integers named in ON_HOST stay on
        the CPU: they are read as Python values, and to read those would wait for a GPU.
    Errors: ValueError where batch sizes differ.
    """

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: value.shape[0] for name, value in self.tensors.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"Cond: expected one batch size for all tensors, got {sizes}.")

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The tensor of that name, or None where the family left it out."""
        return self.tensors.get(name)

    @property
    def device(self) -> torch.device:
        """Where the first of its tensors is."""
        return next(iter(self.tensors.values())).device

    @property
    def bsz(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Cond:
        return Cond({name: fn(value) for name, value in self.tensors.items()})

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Cond:
        """A copy on `device` (ON_HOST stays); floats take `dtype`, integers keep theirs."""
        return Cond(
            {
                name: v
                if name in ON_HOST
                else v.to(device=device, dtype=dtype if v.is_floating_point() else None)
                for name, v in self.tensors.items()
            }
        )

    def slice(self, start: int, stop: int) -> Cond:
        return self._map(lambda v: v[start:stop])

    def index(self, rows: Tensor | Sequence[int]) -> Cond:
        """The given rows, in that order."""
        return self._map(lambda v: v[torch.as_tensor(rows, device=v.device)])

    def where_not(self, rows: Tensor, other: Cond) -> Cond:
        """These rows, but `other`'s where the mask `rows` (B,), on the CPU, is true."""

        def mixed(name: str, value: Tensor) -> Tensor:
            mask = rows.to(value.device).view(-1, *([1] * (value.ndim - 1)))
            return torch.where(mask, other[name], value)

        return Cond({name: mixed(name, value) for name, value in self.tensors.items()})

    def repeat(self, times: int) -> Cond:
        """Each row `times` times, neighbours together (row 0, row 0, row 1, ...)."""
        return self._map(lambda v: v.repeat_interleave(times, dim=0))

    @staticmethod
    def cat(parts: Sequence[Cond]) -> Cond:
        """Rows of all parts in order. Errors: ValueError where the keys differ."""
        keys = {tuple(sorted(part.tensors)) for part in parts}
        if len(keys) != 1:
            raise ValueError(f"Cond.cat: expected the same keys in every part, got {sorted(keys)}.")
        return Cond(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )


@dataclass(frozen=True)
class Batch:
    """What a method's loss gets.

    cond, null: conditioning and its empty counterpart, B rows each.
    shape:      (C, *S) of one sample: methods that need no data draw their noise with it.
    x0:         (B, C, *S) scaled latents, or None.
    noise:      (B, C, *S) the noise an offline pair began from, or None.
    prompts:    the B prompts as text, for scorers that read it, or None (class labels).
    extra:      further batch-first tensors a dataset and a method agree on.
    gan:        (x0, cond) of the discriminator's own data source, or None.
    easier:     (cond, null) with each row's easier image in place of its own, or None.
    """

    cond: Cond
    null: Cond
    shape: tuple[int, ...]
    x0: Tensor | None = None
    noise: Tensor | None = None
    prompts: tuple[str, ...] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    gan: tuple[Tensor, Cond] | None = None
    easier: tuple[Cond, Cond] | None = None

    @property
    def bsz(self) -> int:
        return self.cond.bsz

    def nulled(self, rows: Tensor) -> Batch:
        """The batch with the null condition in `rows`, a mask (B,) on the CPU: prompt dropout."""
        return replace(self, cond=self.cond.where_not(rows, self.null))

    @property
    def real(self) -> tuple[Tensor, Cond]:
        """(x0 (B, C, *S), its own cond) that a discriminator learns as real: of the source it has
        to itself, else this batch's."""
        if self.gan is not None:
            return self.gan
        assert self.x0 is not None, "the trainer checks `needs`"
        return self.x0, self.cond

    def has(self) -> frozenset[str]:
        """Names of the fields this batch carries, the vocabulary of `Method.needs`."""
        names = {"cond", "null", *self.extra}
        names |= {
            name for name in ("x0", "noise", "prompts", "easier") if getattr(self, name) is not None
        }
        names |= {"real"} if self.gan is not None or self.x0 is not None else set()
        return frozenset(names)


@dataclass(frozen=True)
class Losses:
    """One phase's result: the scalar to differentiate, and detached scalars to log.

    sample: (B, C, *S) what the student's own sampler made, with graph, of a loss that has it
        anyway: a run's rewards judge that, and else one drawn for them.
    """

    total: Tensor
    logs: Mapping[str, Tensor] = field(default_factory=dict)
    sample: Tensor | None = None

    def plus(self, weight: float, term: Tensor, **logs: Tensor) -> Losses:
        """These losses and `weight` times a further term, with further values to log."""
        detached = {name: value.detach() for name, value in logs.items()}
        total, logs = self.total + weight * term, {**self.logs, **detached}
        return replace(self, total=total, logs=logs)
