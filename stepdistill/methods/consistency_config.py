"""Options of consistency distillation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.abilities import Abilities
from stepdistill.core.context import Ctx
from stepdistill.core.method import MethodConfig
from stepdistill.core.path import NoisePath, flow_time
from stepdistill.losses.regression import DistanceName
from stepdistill.losses.rewards import LPIPSOptions
from stepdistill.methods.grid import (
    LOWEST,
    Boundary,
    drawn_times,
    earlier_time,
    path_time,
)


class GridGrowth(MethodConfig):
    """CT's schedule: a coarse grid first (low variance), a fine one later (low bias).

    N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 points at step k; s1 is num_grid. A
    VP table takes the nearest divisor of its length below N(k) - 1 intervals.
    Source: Song et al. 2023, arXiv:2303.01469, Sec. 5 and Appendix C.
    """

    start: int = Field(default=2, ge=2)
    """s0: grid points at the first student update."""
    steps: int = Field(ge=1)
    """K: student updates until the grid has num_grid intervals; it stays so afterwards."""

    def intervals(self, step: int, num_grid: int) -> int:
        """N(k) - 1: how many pairs of neighbours student update `step` draws from."""
        share = min(step / self.steps, 1.0)
        root = math.sqrt(share * ((num_grid + 1) ** 2 - self.start**2) + self.start**2)
        return math.ceil(round(root - 1.0, 9))


def noise_ratio(path: NoisePath, t: Tensor) -> Tensor:
    """(B,) sigma / alpha, finite where alpha is 0: EDM's sigma on every path."""
    tau = flow_time(path, t).clamp_max(1.0 - LOWEST)
    return tau / (1.0 - tau)


class Shrinking(MethodConfig):
    """ECT's pairs (t, r), whose ratio r / t grows from diffusion training (r = 0) towards 1.

    r / t = 1 - (1 + 8 sigmoid(-t)) / q^(stage + 1) within [0, max_ratio], of noise-to-signal ratios
    t and r; log t is normal. Source: Geng et al. 2024, arXiv:2406.14548, and its released code.
    TCM's second stage: no t below truncate_at, below which the student that the run began with
    answers. Source: Lee et al. 2024, arXiv:2410.14895.
    """

    q: float = Field(default=2.0, gt=1)
    """How much a stage narrows the pairs."""
    stages: int = Field(default=8, ge=1)
    """Stages, of equally many student updates."""
    max_ratio: float = Field(default=0.999, gt=0, lt=1)
    """Largest r / t."""
    time_mean: float = -1.1
    """Mean of log t."""
    time_std: float = Field(default=2.0, gt=0)
    """Standard deviation of log t."""
    weight: Literal["none", "inverse_span", "c_out"] = "inverse_span"
    """Weight of a pair: none, 1 / (t - r), or 1 / t^2 + 4, that of errors of EDM's network."""
    truncate_at: float = Field(default=0.0, ge=0)
    """TCM's t', the least t; 0 has none. Start from a consistency model: --init_student_from."""
    boundary_share: float = Field(default=0.25, gt=0, lt=1)
    """Share of samples at t = t' itself; read with truncate_at alone."""
    boundary_weight: float = Field(default=0.1, gt=0)
    """Weight of their mean loss beside that of the others."""

    def pair(self, ctx: Ctx, bsz: int, path: NoisePath, end: float) -> tuple[Tensor, Tensor]:
        """(t, s), each (B,) float64 path times of t and r; s is `end` where r is 0."""
        u = ctx.stratified(bsz)
        if self.truncate_at:
            low = (math.log(self.truncate_at) - self.time_mean) / self.time_std / math.sqrt(2.0)
            u = ((u - self.boundary_share) / (1.0 - self.boundary_share)).clamp_min(0.0)
            u = 0.5 * (math.erfc(-low) + math.erfc(low) * u)
        t = drawn_times(path, u, self.time_mean, self.time_std)
        now, stage = (
            noise_ratio(path, t),
            min(ctx.step * self.stages // ctx.max_steps, self.stages - 1),
        )
        share = 1.0 - (1.0 + 8.0 * (-now).sigmoid()) / self.q ** (stage + 1)
        later = now * share.clamp(0.0, self.max_ratio)
        span, ends = flow_time(path, t) - later / (1.0 + later), torch.full_like(t, end)
        s = earlier_time(path, t, ends, span)
        return t, torch.where((later > 0.0) & (s < t), s, ends)

    def weights(self, path: NoisePath, t: Tensor, s: Tensor) -> Tensor:
        """(B,) factors on the distances of pairs (t, s)."""
        now, weight = noise_ratio(path, t), torch.ones_like(t)
        if self.weight == "inverse_span":
            between = now - noise_ratio(path, s)
            weight = torch.where(between > 0.0, 1.0 / between.clamp_min(1e-9), 0.0)  # at sigma_min
        elif self.weight == "c_out":
            weight = 1.0 / now**2 + 4.0
        if not self.truncate_at:
            return weight
        share, edge = self.boundary_share, t <= self.edge(path, t) + 1e-9
        return weight * torch.where(edge, self.boundary_weight / share, 1.0 / (1.0 - share))

    def edge(self, path: NoisePath, like: Tensor) -> Tensor:
        """(B,) the path time of truncate_at."""
        return path_time(path, torch.full_like(like, self.truncate_at / (1.0 + self.truncate_at)))


class ConsistencyConfig(MethodConfig):
    num_grid: int = Field(default=50, ge=1)
    """Points of the solver grid; one teacher step spans 1 / num_grid. Divides a VP table."""
    solver: Literal["ddim", "heun", "data"] = "ddim"
    """Teacher step: ddim (Euler on flow), heun (2nd order), data (no teacher: CT, Euler on x0)."""
    boundary: Boundary = "auto"
    """How f(x, end) = x: lcm skip/out (VP), cd skip/out (VE), none (end 0, where x0 is x); auto is
    lcm on VP, cd on VE, none on flow. The sampler applies the same."""
    timestep_scaling: float = Field(default=10.0, gt=0)
    """Scale of the table index in LCM's skip/out coefficients."""
    guidance_range: tuple[float, float] = (4.0, 16.0)
    """Teacher guidance g, uniform per sample; equal ends fix it, (1, 1) turns it off. g = w + 1."""
    embed_guidance: bool = False
    """Tell the student w = g - 1 (full students of families with a guidance embedding only)."""
    inference_guidance: float = 8.5
    """The g whose w = g - 1 the sampler tells the student; read with embed_guidance alone."""
    target: Literal["ema", "self"] = "ema"
    """Target network: EMA of the student, or the student itself without gradients."""
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the EMA target after every student step."""
    loss: DistanceName | Literal["lpips", "norm"] = "l2"
    """Distance: l2, l1 or pseudo-Huber of latents, their unsquared norm (ECT), or lpips of decoded
    images."""
    lpips: LPIPSOptions = LPIPSOptions(resize=224, resize_below=256, pooling="avg")
    """Options of loss lpips, as consistency_models has them."""
    huber_c: float = Field(default=1e-3, gt=0)
    """c of the pseudo-Huber distance, and of norm's, relative to the root of the sample's size."""
    growth: GridGrowth | None = None
    """Let the grid grow to num_grid while training without a teacher (CT); none keeps it."""
    shrink: Shrinking | None = None
    """Draw pairs of times by ECT's shrinking law, off the grid, which the sampler alone visits."""
    num_steps: int = Field(default=4, ge=1)
    """Sampling steps where none are asked for."""

    @model_validator(mode="after")
    def _check(self) -> ConsistencyConfig:
        low, high = self.guidance_range
        if not 0 <= low <= high:
            raise ValueError(f"guidance_range: expected 0 <= low <= high, got {(low, high)}.")
        if self.growth is not None and self.growth.start > self.num_grid:
            raise ValueError(
                f"growth.start: expected at most num_grid = {self.num_grid}, got "
                f"{self.growth.start}."
            )
        if self.growth is not None and self.shrink is not None:
            raise ValueError(
                "shrink: expected no growth beside it (its pairs leave the grid), got both. Leave "
                "one of them out."
            )
        if self.num_steps > self.num_grid:
            raise ValueError(
                f"num_steps: expected at most num_grid = {self.num_grid}, got {self.num_steps}."
            )
        if self.embed_guidance and self.solver == "data":
            raise ValueError("embed_guidance: expected a guided solver, got 'data'. Use 'ddim'.")
        if self.embed_guidance and not low <= self.inference_guidance <= high:
            raise ValueError(
                f"inference_guidance: expected a value inside guidance_range {(low, high)}, got "
                f"{self.inference_guidance}. The embedding is trained on no other."
            )
        return self

    @classmethod
    def unfit(cls, options: Mapping[str, Any], model: Abilities) -> dict[str, tuple[Any, str]]:
        """See MethodConfig.unfit."""
        if not options.get("embed_guidance"):
            return {}
        made: dict[str, tuple[Any, str]] = {}
        why = "the embedding learns no other"
        if not model.told_guidance:
            why = "this model can't be told its guidance"
            made["embed_guidance"] = (False, why)
        fields = cls.model_fields
        low, high = options.get("guidance_range", fields["guidance_range"].default)
        guidance = options.get("inference_guidance", fields["inference_guidance"].default)
        if not low <= guidance <= high:
            made["inference_guidance"] = (min(max(guidance, low), high), why)
        return made

    @property
    def truncated(self) -> bool:
        """Whether a frozen student answers below the truncation time (TCM)."""
        return self.shrink is not None and self.shrink.truncate_at > 0.0

    def target_decay(self, step: int) -> float:
        """Decay of the EMA target after student update `step`: exp(s0 log mu0 / intervals), CT.

        The coarser the grid, the faster the target follows. consistency_models divides by the
        intervals, so that mu(0) = mu0^s0; the paper by the points N(k), one more: mu(0) = mu0.
        """
        if self.growth is None or self.ema_decay == 0.0:
            return self.ema_decay
        intervals = self.growth.intervals(step, self.num_grid)
        return math.exp(self.growth.start * math.log(self.ema_decay) / intervals)
