"""What a forecast says, read and reckoned with without torch: a stored one needs no trace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cost:
    """Bytes and operations of one update of one phase. activations: the peak above `resident`.
    since: the student step from which on updates are so; share: of the run's that are."""

    phase: str
    repeat: int
    activations: int
    flops: int
    since: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class Forecast:
    """What one process holds, in bytes, and what one student step computes.

    frozen: denoiser weights no phase trains. beside: networks that run in its every call, which
    sharding leaves whole. trained, averaged: weights by role. gradients: of the
    largest phase. optimizer: both Adam moments of every trained role (optimizer_8bit: in 8 bits).
    encoders: text encoders and VAE, where they are not offloaded. judges: scorers of images, and
    the VAE or small decoder that makes these. encoding: the peak of encoding a prompt above all
    that. phases: of a step at which all rewards are due. accumulation: micro-batches of each
    update. validation: what run.json would say of a run's own, where it has them.
    """

    model: str
    method: str
    num_parameters: int
    frozen: int
    trained: dict[str, int]
    averaged: int
    gradients: int
    optimizer: int
    encoders: int
    encoding: int
    judges: int = 0
    optimizer_8bit: int = 0
    checkpointing: bool = False
    quantization: str = "none"
    phases: tuple[Cost, ...] = field(default=())
    validation: dict[str, Any] = field(default_factory=dict)
    beside: int = 0
    largest_block: int = 0
    kept_gathered: int = 0
    accumulation: int = 1

    @property
    def resident(self) -> int:
        """Held throughout training, gradients aside."""
        weights = self.frozen + sum(self.trained.values()) + self.averaged
        return weights + self.optimizer + self.encoders + self.judges + self.beside

    @property
    def peak(self) -> int:
        """The most that is held at once on one process without sharding."""
        busiest = max((c.activations for c in self.phases), default=0)
        return self.resident + max(busiest, self.encoding)

    @property
    def flops_per_step(self) -> int:
        """Operations of one student step: every phase, every repeat, every micro-batch; where they
        change in a run, the mean."""
        total = sum(c.flops * c.repeat * c.share for c in self.phases)
        return round(self.accumulation * total)

    def peak_on(self, num_gpus: int, sharding: str = "ddp") -> int:
        """Bytes on each of `num_gpus`: ddp adds the gradient buckets, fsdp2 shards what is held.

        fsdp2: weights, gradients and moments are divided (as counted on gloo processes). On top
        come what belongs to no block, gathered for a step, and two blocks: one at work, one next.
        """
        if num_gpus == 1:
            return self.peak
        if sharding == "ddp":
            return self.peak + self.gradients
        unsharded = self.encoders + self.judges + self.beside
        held = self.resident - unsharded + self.gradients
        active = self.peak - self.resident - self.gradients
        gathered = self.kept_gathered + 2 * self.largest_block
        return unsharded + held // num_gpus + max(active, 0) + gathered

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Forecast:
        """Of what `dataclasses.asdict` gave, through JSON."""
        return cls(**{**stored, "phases": tuple(Cost(**cost) for cost in stored["phases"])})
