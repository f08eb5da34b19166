"""Options of meanflow: the residual's times, its estimator, and what is made of it."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

from pydantic import Field, model_validator

from stepdistill.methods.gan import GANConfig
from stepdistill.methods.scores_config import ScoreConfig

SCM: dict[str, Any] = {"r": "zero", "sampler": "renoise"}
LADD = {"weight_g": 0.5, "weight_d": 0.5, "source": "teacher", "loss": "hinge"}  # SANA-Sprint's
# What distribution matching alone reads.
MATCHING = (
    *("order", "critic_steps", "dm_t_range", "fake_t_range", "weight", "fake_space"),
    *("fake_weight", "rollout", "trained_step"),
)


class MeanFlowConfig(ScoreConfig):
    r: Literal["zero", "phases", "general"] = "phases"
    """Where the average velocity of t ends: at clean data (zero: sCM; x0 and fresh noise, in any
    number of steps), at the lower edge of t's phase (phases: of num_steps deterministic steps), or
    at any r <= t (general: MeanFlow's own; full students that are told r, not exported)."""
    sampler: Literal["renoise", "ode"] = "ode"
    """Between steps: fresh noise on x0 (with r zero), or the deterministic step (with the rest)."""
    time_mean: float = -0.4
    """Mean of the logit-normal law of rectified-flow times: sCM's mean of log(sigma / sigma_data).
    A resolution shift k adds log k."""
    time_std: float = Field(default=1.0, gt=0)
    """Standard deviation of that law."""
    same_share: float = Field(default=0.25, ge=0, lt=1)
    """Share of samples with r = t, plain velocity matching; read with r general alone."""
    estimator: Literal["backward", "jvp", "alphaflow"] = "backward"
    """How du/dt is taken along the teacher's ODE: a backward difference over h, a Jacobian-vector
    product (flow and VE paths, networks that can be differentiated forward), or AlphaFlow's
    interpolation over alpha (t - r)."""
    h: float = Field(default=0.01, ge=5e-3, le=0.5)
    """Span of the backward difference in rectified-flow time. Below 0.005 rounding rules it."""
    alpha: float = Field(default=0.05, ge=5e-3, le=1)
    """AlphaFlow's last ratio, annealed from 1 over warmup_steps; 1 is plain trajectory matching."""
    warmup_steps: int = Field(default=0, ge=0)
    """Updates over which du/dt gains its full weight, from velocity matching on; distribution
    matching waits for their end."""
    norm_power: float = Field(default=1.0, ge=0, le=2)
    """p of D / (|D| + c)^p, |D| a sample's root mean square: 1 is sCM's, 2 MeanFlow's paper's
    (its p = 1 of the squared norm), 0 none."""
    norm_c: float = Field(default=0.1, gt=0)
    """c of the same."""
    time_weight: Literal["none", "scm"] = "none"
    """Weight over times: none, or sCM's prior 1 / tan t of its TrigFlow loss."""
    guidance: float = Field(default=3.0, ge=0)
    """Guidance g of the teacher, null + g (cond - null), folded in; 1 means none."""
    matching: float = Field(default=0.0, ge=0)
    """Weight of distribution matching beside the residual, with a fake score (rCM); 0 has none."""
    pure_noise: float = Field(default=0.5, ge=0, le=1)
    """Share of the samples judged by the GAN that the student makes from pure noise, not from
    noised images; read with r zero, without matching."""
    gan: GANConfig = GANConfig()
    """Adversarial term, off by default; without matching its source is the teacher (SANA-Sprint) or
    a pixel network, and weight_d has to be of the order of 1."""

    @model_validator(mode="after")
    def _check_residual(self) -> MeanFlowConfig:
        wanted = "renoise" if self.r == "zero" else "ode"
        if self.sampler != wanted:
            raise ValueError(
                f"sampler: expected {wanted} with r {self.r}, got {self.sampler}. Set sampler: "
                f"{wanted}."
            )
        if self.matching and self.r == "general":
            raise ValueError(
                "matching: expected 0 with r general (its rollouts tell no r), got "
                f"{self.matching}. Set r: zero or phases."
            )
        if self.gan.enabled and self.r == "general":
            raise ValueError(
                "gan: expected weight_g 0 with r general (its rollouts tell no r), got "
                f"{self.gan.weight_g:g}. Set r: zero or phases."
            )
        if self.gan.enabled and not self.matching and self.gan.source == "fake":
            raise ValueError(
                "gan.source: expected teacher or pixels without matching (there is no fake), got "
                "fake. Set gan.source: teacher."
            )
        if self.changed("pure_noise") and not (
            self.gan.enabled and self.r == "zero" and not self.matching
        ):
            warnings.warn(
                "pure_noise has no effect: it is of a gan with r zero, without matching.",
                stacklevel=2,
            )
        idle = self.changed(*MATCHING)
        if idle and not self.matching:
            warnings.warn(
                f"{', '.join(idle)} has no effect: nothing is matched. Set matching, say to 1.",
                stacklevel=2,
            )
        return self

    def ramp(self, step: int) -> float:
        """k in [0, 1]: how far the warm-up is at student update `step`."""
        return min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0

    def ratio(self, step: int) -> float:
        """AlphaFlow's alpha: a sigmoid from 1, arXiv:2510.20771, Sec. 4 (temperature 25)."""
        return max(self.alpha, 1.0 / (1.0 + math.exp(25.0 * (self.ramp(step) - 0.5))))
