"""A method under the resolution shift of each batch's shape (aspect-ratio buckets).

A method is made for the times of one size. Where the stock call shifts its times by the number of
image tokens (Flux, Qwen-Image, ...), a batch of another shape is trained by a method made for that
shape's shift; both share what they keep between steps. Elsewhere there is one for all shapes.
"""

# Shapes: B batch, C channels, H, W spatial.

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stepdistill.core.context import Ctx
from stepdistill.core.method import Method, Nets, Phase
from stepdistill.core.types import Batch, Losses
from stepdistill.families.family import Family


class MethodByShape:
    """Losses of a method, by the shapes of batches.

    Args: method: made for images of `resolution` px a side, or of the model's own size.
    """

    def __init__(self, method: Method[Any], family: Family, resolution: int | None) -> None:
        self.method, self._family = method, family
        self.shape = family.sample_shape(resolution, resolution)
        self._others: dict[float, Method[Any]] = {method.setting.shift: method}
        self._shifts: dict[tuple[int, ...], float] = {self.shape: method.setting.shift}

    def shift(self, shape: tuple[int, ...]) -> float:
        """The stock call's shift for latents of that shape (C, H, W)."""
        if shape not in self._shifts:
            family = self._family
            height, width = (side * family.latent_px for side in shape[-2:])
            self._shifts[shape] = family.shift_at(height, width)
        return self._shifts[shape]

    def at(self, shape: tuple[int, ...]) -> Method[Any]:
        """The method made for that shape's shift."""
        shift = self.shift(shape)
        if shift not in self._others:
            setting = replace(self.method.setting, shift=shift)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the run's own has warned
                self._others[shift] = type(self.method)(self.method.config, setting)
        return self._others[shift]

    def loss(self, phase: Phase, batch: Batch) -> Callable[[Nets, Batch, Ctx], Losses]:
        """The phase's loss on a batch of that shape."""
        return phase.loss if batch.shape == self.shape else self._of(phase, batch.shape)

    def _of(self, phase: Phase, shape: tuple[int, ...]) -> Callable[[Nets, Batch, Ctx], Losses]:
        other = self.at(shape)
        if other is self.method:
            return phase.loss

        def loss(nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
            phase_here = next(p for p in other.phases(ctx.step) if p.name == phase.name)
            if state := self.method.state_dict():
                other.load_state_dict(state)
            losses = phase_here.loss(nets, batch, ctx)
            if state:
                self.method.load_state_dict(other.state_dict())
            return losses

        return loss
