"""Options of dmd2."""

from __future__ import annotations

import math
import warnings
from typing import Literal

from pydantic import Field, model_validator

from stepdistill.core.method import MethodConfig
from stepdistill.methods.scores_config import ScoreConfig


class ApproachConfig(MethodConfig):
    """A teacher that starts near the fake and walks to itself (DMDR)."""

    share: float = Field(default=0.0, ge=0, le=1)
    """Share of the fake's adapter that the teacher carries at first (DMDR: 0.75 of its strength);
    0 is the teacher itself."""
    updates: int = Field(default=10_000, ge=1)
    """Student updates over which share, and the noisy times, fade by a cosine."""
    noisy_first: bool = False
    """Draw times by Beta(4, 1.5) at first, which becomes uniform meanwhile."""

    def left(self, step: int) -> float:
        """1 at first, 0 from `updates` on."""
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / self.updates)))


class DMD2Config(ScoreConfig):
    """Options of dmd2."""

    gan_alone: bool = False
    """Train the student by the GAN alone, without distribution matching (an ablation of DMD2)."""
    ca_times: Literal["shared", "below_step"] = "shared"
    """Noise levels at which guidance is measured: those of the rest of the gradient (DMD2), or of
    their own, below the time of the student's step (Decoupled DMD): finer ones are undecided."""
    fake_toward_student: float = Field(default=0.0, ge=0, lt=1)
    """Share of the student's weights mixed into the fake's after each update (SenseFlow: 0.02)."""
    approach: ApproachConfig = ApproachConfig()
    """A teacher that starts near the fake; off by default."""

    chunk: int = Field(default=0, ge=0)
    """Latent frames of a chunk of a causal video student (3 of Wan's 21): it makes a clip chunk by
    chunk, each seeing those before it alone, under a teacher and a fake that see all. 0: as the
    teacher. Full students; rollout simulate is Self Forcing, data CausVid, and warm_start the
    regression on the teacher's trajectories that both begin with."""

    @model_validator(mode="after")
    def _tell_of_export(self) -> DMD2Config:
        if self.chunk and (self.chunk == 1 or self.sampler != "ode" or self.student_times):
            warnings.warn(
                f"chunk {self.chunk}, sampler {self.sampler}"
                f"{', student_times' if self.student_times else ''}: no stock pipeline makes such "
                "clips, so the student can be trained and sampled but not exported. For export set "
                "sampler ode, num_steps, and chunks of 2 latent frames or more.",
                stacklevel=2,
            )
        return self

    @model_validator(mode="after")
    def _check_gan_alone(self) -> DMD2Config:
        if self.gan_alone and not self.gan.enabled:
            raise ValueError("gan_alone: expected gan.weight_g > 0, got 0. Set it, say to 1e-3.")
        if self.gan_alone and self.changed("guidance") and self.guidance != 1.0:
            warnings.warn(
                f"guidance {self.guidance} has no effect with gan_alone: the student follows the "
                "images, not the teacher.",
                stacklevel=2,
            )
        if self.ca_times != "shared" and self.guidance == 1.0:
            warnings.warn(
                f"ca_times {self.ca_times} has no effect: guidance 1 has no term of its own.",
                stacklevel=2,
            )
        return self
