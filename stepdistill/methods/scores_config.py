"""Options of score distillation, shared by the methods built on `scores.ScoreDistillation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stepdistill.core.method import Setting
from stepdistill.losses.score import DenoisingSpace, DenoisingWeight, ScoreWeight
from stepdistill.methods.gan import GANConfig
from stepdistill.methods.rollout import TimeRange
from stepdistill.methods.warm_start import WarmStartedConfig


class ScoreConfig(WarmStartedConfig):
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
    gan: GANConfig = GANConfig()
    """Adversarial term; off by default, and then no image is needed."""

    def error_space(self, setting: Setting) -> str:
        """fake_space, of a network of that setting."""
        return setting.kind if self.fake_space == "native" else self.fake_space

    def check_fake_weight(self, setting: Setting) -> None:
        """Errors: ValueError for EDM's weight on an error that is not of x0."""
        space = self.error_space(setting)
        if self.fake_weight == "edm" and space != "x0":
            raise ValueError(
                f"fake_weight: expected none or alpha2 with errors in {space}, got edm. Set "
                "fake_space: x0."
            )
