"""A feature network of somebody else's: what colours an image has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Colours:
    """Mean and deviation of each channel. Called with the device, as `--features` does."""

    name = "colours"

    def __init__(self, device: Any) -> None:
        self.device = device
        self.facts = {"weights": "none", "preprocess": "none"}

    def preprocess(self, images: Tensor) -> Tensor:
        """See FeatureNet."""
        return images

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, 2 C) features."""
        return torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], dim=1).float()
