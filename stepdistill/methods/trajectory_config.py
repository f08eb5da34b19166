"""Options that the trajectory-segmented methods share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from stepdistill.core.method import MethodConfig
from stepdistill.losses.adversarial import AdversarialLoss
from stepdistill.losses.regression import DistanceName
from stepdistill.methods.gan import HeadConfig


class TrajectoryGAN(HeadConfig):
    """Adversarial consistency, off unless weight_g > 0. Real is the target's jump (ctm: images)."""

    weight_d: float = Field(default=1.0, gt=0)
    """Weight of the discriminator loss, which has updates of its own."""
    source: Literal["teacher"] = "teacher"
    """Whose features the head reads: the frozen teacher's."""
    loss: AdversarialLoss = "clipped_hinge"
    """softplus (non-saturating), hinge, or clipped_hinge (the generator's stops at the margin)."""
    same_noise: bool = False
    """Carry real and fake to the noisier time with one noise; that time is always the same."""


class TrajectoryConfig(MethodConfig):
    """Options of tscd, pcm and ctm alike."""

    num_grid: int = Field(default=40, ge=1)
    """Intervals K of the solver grid, a multiple of every segment count; 40 or 200."""
    guidance_range: tuple[float, float] = (5.0, 6.0)
    """Teacher guidance g, uniform per sample; equal ends fix it, (1, 1) turns it off. g = w + 1."""
    null_probability: float = Field(default=0.0, ge=0, lt=1)
    """Chance that a sample's condition is the null one, for all networks: with guidance_range
    (1, 1) the student can then be guided at inference."""
    inference_guidance: float = Field(default=1.0, ge=0)
    """Guidance the sampler still applies, of a student trained without; 1 is none."""
    target: Literal["ema", "self"] = "self"
    """Target network: EMA of the student, or the student itself without gradients."""
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the EMA target after every student step."""
    loss: DistanceName = "huber"
    """Elementwise distance: l2, l1 or pseudo-Huber."""
    huber_c: float = Field(default=1e-3, gt=0)
    """c of the pseudo-Huber distance."""
    noise_offset: float = Field(default=0.0, ge=0)
    """Strength of noise constant over each channel, added to the sampled noise."""
    gan: TrajectoryGAN = TrajectoryGAN()
    """Adversarial term."""

    @field_validator("guidance_range")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] <= value[1]:
            raise ValueError(f"guidance_range: expected 0 <= low <= high, got {value}.")
        return value

    @model_validator(mode="after")
    def _guided_once(self) -> TrajectoryConfig:
        if self.inference_guidance != 1.0 and self.guidance_range != (1.0, 1.0):
            raise ValueError(
                f"inference_guidance: expected 1 beside guidance_range {self.guidance_range}, got "
                f"{self.inference_guidance}: guidance would count twice. Set guidance_range to "
                "[1, 1], with null_probability 0.1."
            )
        return self


class AnyEndConfig(TrajectoryConfig):
    """Options of tscd and ctm alike, whose jumps end at any grid time."""

    end_input: bool = False
    """Tell the student where its jump ends, as CTM does (full students, not exported); else one
    answer at (x_t, t) serves all ends, as in TCD."""
    sampler: Literal["ode", "tcd"] = "ode"
    """Deterministic steps (trailing DDIM, on flow Euler), or TCD's with noise travel (on flow by a
    scheduler that the export carries)."""
    gamma: float = Field(default=0.3, ge=0, le=1)
    """Stochasticity of the tcd sampler: 0 none, 1 fresh noise on x0. Read with tcd alone."""
    num_steps: int | None = Field(default=None, ge=1)
    """Sampling steps where none are asked for, a multiple of the last segment count (the
    default)."""
