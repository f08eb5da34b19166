"""A fixed smooth function of (x, t) as network: loops that call it alike differ by their steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.path import NoisePath, PredictionType
from stepdistill.core.types import Cond

SHAPE = (2, 3, 4, 4)
EMPTY = Cond({"rows": torch.zeros(2)})
STOCK_KIND = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def network(x: Tensor, index: Tensor | float) -> Tensor:
    """Some smooth output that depends on every input."""
    return torch.tanh(0.7 * x + 0.3) + 0.2 * x.roll(1, -1) - float(index) / 2000.0


class Fixed(Denoiser):
    """`network` as a Denoiser."""

    def __init__(self, path: NoisePath, kind: PredictionType) -> None:
        self.path, self.kind = path, kind

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return network(x_t, self.path.model_time(t)[0].item()), {}
