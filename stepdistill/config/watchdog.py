"""Options of the watchdog: what each check does when a run goes wrong, and from where on.

Every check can warn (one line), back off (lower a role's learning rate) or stop the run. The
thresholds are ours, set on small models; no paper gives them. Those of spread and fake_error have a
bound of 1 behind them (monitoring/step_signs.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stepdistill.core.options import Options

Action = Literal["off", "warn", "back_off", "stop"]


class WatchdogConfig(Options):
    """What watches over a run. Checks of samples run at validations, the others at log lines.

    Spread, fake_error, diversity, movement and drift tell what has become half as bad again as it
    was at its best; all but drift, after a quarter of the run, also what never became better than
    at first.
    """

    nonfinite: Literal["back_off", "stop"] = "stop"
    """Non-finite loss or gradient. back_off skips that update (reading the gradient norm before
    every update, a synchronisation each) and lowers its roles' learning rates. No warn: weights
    that took one such step are lost."""
    max_skipped_updates: int = Field(default=10, ge=1)
    """Updates in a row that back_off skips before the run is stopped after all."""

    grad_norm: Action = "warn"
    """A role's gradient norm, before clipping, far above its own running median. back_off lowers
    that role's learning rate."""
    grad_norm_ratio: float = Field(default=20.0, gt=1)
    """Gradient norm over its median from which on it is told."""
    grad_norm_window: int = Field(default=200, ge=20)
    """Updates of a role that its median is taken over."""

    spread: Action = "warn"
    """Spread of the student's x0 over a batch, and over those of its samples that have the same
    condition, against that of the teacher's x0 (without guidance) in the same update. back_off
    lowers the student's learning rate."""
    min_spread: float = Field(default=0.7, gt=0, lt=1)
    """Ratio of those root-mean-square distances below which it is told: a student that draws what
    the teacher does is at 1 or above, as a denoised mean spreads no wider than what it is of."""
    fake_error: Action = "warn"
    """Denoising error of the fake score on the student's samples over the teacher's on the same
    ones (distribution matching). back_off lowers the student's learning rate."""
    max_fake_error: float = Field(default=1.25, gt=1)
    """That ratio from which on it is told: a fake that knows the student's samples is at 1 or
    below, as their own mean is the best guess; above it the student follows the fake's errors."""
    sign_window: int = Field(default=100, ge=1)
    """Student updates that the running medians of spread and fake_error are taken over, and the
    stretches of reward."""

    reward: Action = "warn"
    """A reward kept out of training (weight 0) that has fallen from its best, beyond three standard
    errors, while a trained one has risen by as clear a difference: the student pleases one judge
    alone. back_off lowers the student's learning rate."""

    fake_lag: Action = "warn"
    """Share of the student's gradient that the fake score's lag accounts for (distribution
    matching; see monitoring/fake_lag.py). back_off lowers the student's learning rate."""
    max_fake_lag: float = Field(default=0.5, gt=0)
    """Lag, of either sign and beyond two standard errors, from which on it is told."""

    drift: Action = "warn"
    """Mean, spread and saturation of the student's samples against the teacher's of the same noise.
    back_off lowers the student's learning rate."""
    max_mean_drift: float = Field(default=0.75, gt=0)
    """Shift of the channel means of x0, in standard deviations of the teacher's x0."""
    max_std_ratio: float = Field(default=2.0, gt=1)
    """Ratio of the standard deviations of x0, either way round."""
    max_saturation: float = Field(default=0.25, gt=0)
    """Share of image values at or beyond black and white, above the teacher's."""

    diversity: Action = "warn"
    """Mean pairwise distance of the samples of a prompt against the teacher's (without teacher
    samples: against the first validation's). back_off lowers the student's learning rate."""
    min_diversity: float = Field(default=0.3, gt=0, lt=1)
    """That ratio below which it is told."""

    movement: Action = "warn"
    """Mean |frame_i - frame_0| of the student's videos against the teacher's: from a first frame,
    students tend to keep it still. back_off lowers the student's learning rate."""
    min_movement: float = Field(default=0.5, gt=0, lt=1)
    """That ratio below which it is told."""

    patience: int = Field(default=2, ge=1)
    """Validations in a row that must be bad before a check of samples acts."""
    back_off_factor: float = Field(default=0.5, gt=0, lt=1)
    """What back_off multiplies a learning rate by, at most five times over."""
    cooldown_steps: int = Field(default=500, ge=1)
    """Student updates before the same alarm is told again, and after which a lowered learning rate
    is raised again by one factor."""
