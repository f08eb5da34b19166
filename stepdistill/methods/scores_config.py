"""Options of score distillation, shared by the methods built on `scores.ScoreDistillation`."""

# Shapes: B batch. t: (B,).

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from stepdistill.core.method import Setting
from stepdistill.core.path import VEPath
from stepdistill.core.times import shift_times, uniform_times, unshift_times
from stepdistill.losses.score import DenoisingSpace, DenoisingWeight, ScoreWeight
from stepdistill.methods.gan import GANConfig
from stepdistill.methods.rollout import RolloutConfig
from stepdistill.methods.warm_start import WarmStartConfig


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 <= value[0] < value[1] <= 1.0:
        raise ValueError(f"time range: expected 0 <= low < high <= 1, got {value}.")
    return value


Within = tuple[float | Tensor, float | Tensor]  # (lowest, highest) time
TimeRange = Annotated[tuple[float, float], AfterValidator(_check_range)]


class ScoreConfig(RolloutConfig):
    """Options that every score distillation has; a method's own Config adds its own."""

    guidance: float = Field(default=1.75, ge=0)
    """Guidance g of the teacher, null + g (cond - null); 1 means none. The fake has none."""
    skip_layers: tuple[str, ...] = ()
    """Transformer blocks, by the family's names, that null passes leave out (skip-layer guidance,
    FastGen's skip_layers); they then run apart from the others. Read where guidance is not 1."""
    order: Literal["critic_always", "exclusive"] = "critic_always"
    """Whether the first fake update of a step takes the student update's own sample
    (critic_always, DMD2) or a new one like the others (exclusive, as alternating trainers do)."""
    critic_steps: int = Field(default=5, ge=1)
    """Fake updates per student update, in both orders."""
    dm_t_range: TimeRange = (0.02, 0.98)
    """Noise levels of the student's gradient."""
    fake_t_range: TimeRange = (0.0, 1.0)
    """Noise levels of the fake's loss and of the GAN; keep it whole."""
    weight: ScoreWeight = "dmd_l1"
    """Gradient weight: per-sample L1 normaliser, VSD's sigma2, or uniform."""
    fake_space: DenoisingSpace = "native"
    """Space of the fake's denoising error; native is the network's own prediction type."""
    fake_weight: DenoisingWeight = "none"
    """Weight of the fake's denoising error over noise levels: none, alpha2 (alpha^2, SwiftBrush),
    or edm (1 / sigma^2 + 1 / sigma_data^2 with fake_space x0, DMD2's for EDM teachers)."""
    warm_start: WarmStartConfig = WarmStartConfig()
    """Regression on the teacher's own trajectories in the first updates; off by default."""
    gan: GANConfig = GANConfig()
    """Adversarial term; off by default, and then no image is needed."""

    def check_fake_weight(self, setting: Setting) -> None:
        """Errors: ValueError for EDM's weight on an error that is not of x0."""
        space = setting.kind if self.fake_space == "native" else self.fake_space
        if self.fake_weight == "edm" and space != "x0":
            raise ValueError(
                f"fake_weight: expected none or alpha2 with errors in {space}, got edm. Set "
                "fake_space: x0."
            )

    def draw_times(
        self,
        setting: Setting,
        u: Tensor,
        t_range: tuple[float, float],
        within: Within | None = None,
    ) -> Tensor:
        """(B,) float64 from u ~ U(0, 1): the shifted uniform law cut to t_range, on the table.

        Cut, not clamped: clamping to [0.02, 0.98] at shift 5 would put 9 % of the draws on 0.98.
        On a VE path the range is of Karras steps, 0 being the teacher's sigma_min.
        Args: within: times, or (B,) of each sample, that the range is cut to besides.
        """
        path, shift = setting.path, self.shift_of(setting)
        first = 0.0  # the path's time at which the range is 0
        if isinstance(path, VEPath):
            first = float(path.time_of_sigma(torch.tensor(path.sigma_min)))
        low, high = unshift_times(torch.tensor(t_range), shift).tolist()
        ends: tuple[float | Tensor, float | Tensor] = (low, high)
        if within is not None:
            parts = ((torch.as_tensor(end) - first) / (1.0 - first) for end in within)
            low_end, high_end = (unshift_times(part, shift).clamp(low, high) for part in parts)
            ends = (low_end, high_end)
        t = shift_times(uniform_times(u, *ends), shift)
        return path.snap(uniform_times(t, first, 1.0) if first else t)
