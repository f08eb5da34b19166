"""Images judged inside a loss: options of the built-in scorers, and what a score costs.

A scorer itself comes from the run (`nets.scorer(name)`); here is only what methods share.
Sources: Zhang et al. 2018, arXiv:1801.03924 (LPIPS); Dao et al. 2024, arXiv:2408.14176
(SwiftBrush v2's clamped CLIP loss); Xu et al. 2023, arXiv:2304.05977 (ReFL); Clark et al. 2023,
arXiv:2309.17400 (DRaFT).
"""

# Shapes: B batch, H, W image size in px.

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.core.method import MethodConfig, ScorerSpec


class LPIPSOptions(MethodConfig):
    """Perceptual distance of two images (rewards.perceptual)."""

    backbone: Literal["vgg", "alex"] = "vgg"
    """Network whose features are compared."""
    weights: str | None = None
    """Safetensors file of the backbone's ImageNet weights, torchvision's names; none means
    torchvision's cache, filled by a download where it is empty."""
    resize: int | None = Field(default=None, ge=16)
    """Side in px that images are resized to first, bilinearly; none leaves them."""
    resize_below: int | None = Field(default=None, ge=16)
    """Resize only images narrower than this, in px; none resizes all."""
    pooling: Literal["max", "avg"] = "max"
    """Pooling inside the backbone: max as published, avg gives smoother gradients."""

    @model_validator(mode="after")
    def _check(self) -> LPIPSOptions:
        if self.resize is None and self.resize_below is not None:
            raise ValueError(
                f"resize_below: expected resize beside it, got {self.resize_below} alone. Set "
                "resize (consistency models: 224, below 256), or leave both out."
            )
        return self

    @property
    def spec(self) -> ScorerSpec:
        """What a method asks the run for."""
        return ScorerSpec("lpips", self.model_dump(include=set(LPIPSOptions.model_fields)))


class CLIPOptions(MethodConfig):
    """Cosine of image and prompt in CLIP's space (rewards.clip)."""

    model: str = "ViT-B-32"
    """open_clip model name, or "local-dir:FOLDER" or "hf-hub:USER/NAME" with its own weights."""
    pretrained: str | None = "laion2b_s34b_b79k"
    """Weights of a named model: a tag of open_clip's table or a local file; null with a folder or
    Hub repository, which bring theirs."""

    @property
    def spec(self) -> ScorerSpec:
        """What a method asks the run for."""
        return ScorerSpec("clip", self.model_dump(include=set(CLIPOptions.model_fields)))


class ClampedCLIPConfig(CLIPOptions):
    """Off unless weight > 0. Needs prompts as text."""

    weight: float = Field(default=0.0, ge=0)
    """Weight of the loss at the first student update; 0 turns it off."""
    weight_end: float = Field(default=0.0, ge=0)
    """Weight that it falls (or rises) to, linearly over max_train_steps."""
    tau: float = Field(default=0.35, gt=-1, le=1)
    """Cosine above which a sample is good enough and costs nothing."""

    @property
    def enabled(self) -> bool:
        return self.weight > 0.0 or self.weight_end > 0.0

    def weight_at(self, step: int, max_steps: int) -> float:
        """The weight at student update `step` of `max_steps`."""
        return self.weight + (self.weight_end - self.weight) * step / max_steps


def reward_loss(score: Tensor, tau: float | None) -> Tensor:
    """Scalar mean of max(0, tau - score): each sample on its own, so none hides behind a good one.
    Without tau the mean of -score.

    Args: score: (B,), higher is better. Source: arXiv:2304.05977 (ReFL), arXiv:2404.13686
        (Hyper-SD), arXiv:2408.14176, Sec. 4.3; arXiv:2309.17400 (DRaFT) without tau.
    """
    return -score.float().mean() if tau is None else F.relu(tau - score.float()).mean()
