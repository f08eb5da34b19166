"""How a few-step student is run in training, and hence how it is sampled afterwards.

A student trained on the grid t_0 > t_1 > ... learns x0 at step k from an input that its own steps
0..k-1 made (DMD2's backward simulation), that the noised data made, or from pure noise alone.
Source: Yin et al. 2024, arXiv:2405.14867, Sec. 4.5 (backward simulation).
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t: (B,).

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import MethodConfig, Nets, Setting
from stepdistill.core.path import NoisePath, VEPath, rows
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import (
    SAME_TIME,
    shift_times,
    snapped_grid,
    uniform_times,
    unshift_times,
)
from stepdistill.core.types import Batch, Cond

START = "start"  # batch field: states (B, C, *S) in which a high-noise expert's student ended


def _check_range(value: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 <= value[0] < value[1] <= 1.0:
        raise ValueError(f"time range: expected 0 <= low < high <= 1, got {value}.")
    return value


Within = tuple[float | Tensor, float | Tensor]  # (lowest, highest) time
TimeRange = Annotated[tuple[float, float], AfterValidator(_check_range)]


class RolloutConfig(MethodConfig):
    """The student's time grid and the way to reach a step of it."""

    num_steps: int = Field(default=1, ge=1)
    """Steps of the student, on the uniform grid 1, (N-1)/N, ..., 1/N under the shift."""
    student_times: tuple[float, ...] | None = None
    """The trained grid itself, descending in (0, 1]; overrules num_steps. Table index n of an
    N-entry VP teacher is (n + 1) / N: 0.4 is conditioning time 399."""
    shift: float | None = Field(default=None, gt=0)
    """Resolution shift of the grid and of the training times; none means the teacher's own."""
    rollout: Literal["pure_noise", "simulate", "data"] = "simulate"
    """Input of step k: pure noise (one-step students), the student's own steps 0..k-1 without
    gradients, or noised real latents. Step 0 always starts from pure noise."""
    sampler: Literal["renoise", "ode"] = "renoise"
    """Between steps: fresh noise on x0, or the deterministic step. Inference does the same."""
    trained_step: Literal["random", "last"] = "random"
    """Which step of the rollout the gradient reaches: one drawn anew each update (DMD2), or always
    the last, so that only the sampler's own output is matched."""

    @model_validator(mode="after")
    def _check_grid(self) -> RolloutConfig:
        times = self.student_times
        if times is not None:
            falls = all(a > b for a, b in pairwise(times))
            if not times or not falls or not 0.0 < times[-1] <= times[0] <= 1.0:
                raise ValueError(
                    f"student_times: expected descending times in (0, 1], got {times}."
                )
            if self.changed("num_steps") and self.num_steps != len(times):
                warnings.warn(
                    f"num_steps {self.num_steps} has no effect: student_times overrules it.",
                    stacklevel=2,
                )
        steps = self.num_steps if times is None else len(times)
        if self.rollout == "pure_noise" and steps > 1:
            raise ValueError(
                f"rollout: expected simulate or data with {steps} student steps, got pure_noise: "
                "later steps would never see an input of theirs. Set rollout: simulate."
            )
        return self

    def shift_of(self, setting: Setting) -> float:
        return setting.shift if self.shift is None else self.shift

    def uniform(self, setting: Setting, num_steps: int) -> tuple[float, ...]:
        """The shifted uniform grid, each time moved to the nearest one the teacher knows."""
        return snapped_grid(setting.path, num_steps, self.shift_of(setting))

    def trained_times(self, setting: Setting) -> tuple[float, ...]:
        """The student's grid, the part of it that the setting owns. Errors: see `whole_grid`, and
        ValueError where no time is owned."""
        return owned_times(self.whole_grid(setting), setting.owned)

    def hand_over(self, setting: Setting) -> float:
        """The time at which the owned part ends and another expert goes on; 0 is clean data."""
        grid = self.whole_grid(setting)
        owned = owned_times(grid, setting.owned)
        return (*grid, 0.0)[grid.index(owned[-1]) + 1]

    def whole_grid(self, setting: Setting) -> tuple[float, ...]:
        """The student's grid, whoever owns its times. Errors: ValueError for a student time between
        table entries."""
        if self.student_times is None:
            return self.uniform(setting, self.num_steps)
        grid = torch.tensor(self.student_times, dtype=torch.float64)
        known = setting.path.snap(grid)
        if bool(((known - grid).abs() > 1e-6).any()):
            nearest = tuple(round(t, 6) for t in known.tolist())
            raise ValueError(
                "student_times: expected times of the teacher's table, "
                f"got {self.student_times}. The nearest are {nearest}."
            )
        return self.student_times

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
        t_range = (max(t_range[0], setting.owned[0]), min(t_range[1], setting.owned[1]))
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

    def spec(self, setting: Setting, num_steps: int | None = None) -> SamplerSpec:
        """The matching sampler. Errors: ValueError where num_steps leaves the trained grid."""
        trained = self.trained_times(setting)
        as_trained = num_steps is None or num_steps == len(trained)
        times = trained
        if not as_trained and num_steps is not None:
            times = owned_times(self.uniform(setting, num_steps), setting.owned)
        grid_of_all = (
            self.whole_grid(setting) if times == trained else self.uniform(setting, num_steps or 1)
        )
        grid = () if setting.owned == (0.0, 1.0) else grid_of_all
        return SamplerSpec(times, self.sampler, trained_times=trained, grid=grid)


def owned_times(grid: tuple[float, ...], owned: tuple[float, float]) -> tuple[float, ...]:
    """The times of a grid in that range, its lower end included, its upper one only if it is 1.

    Errors: ValueError where none is.
    """
    low, high = owned
    ends = (low - SAME_TIME, 2.0 if high == 1.0 else high - SAME_TIME)
    times = tuple(t for t in grid if ends[0] <= t < ends[1])
    if not times:
        raise ValueError(
            f"expert: expected a step of the student from {low:g} to {high:g}, the expert's times, "
            f"got {grid}. Set more steps (--method_config.num_steps), or another shift."
        )
    return times


@dataclass(frozen=True)
class Sample:
    """x0 (B, C, *S) of the student (or of the data) and the condition it was made for.

    x_t, t: the student's input (B, C, *S) and its time (B,); none for data.
    """

    x0: Tensor
    cond: Cond
    x_t: Tensor | None = None
    t: Tensor | None = None

    def detach(self) -> Sample:
        """The same without graph, to be kept in `ctx.carry`."""
        return replace(self, x0=self.x0.detach())


@dataclass(frozen=True)
class Rollout:
    """Draws student samples as the config says, over `times` on `path`.

    from_start: the first step's input is the batch's (START), made by another expert, and no noise.
    """

    config: RolloutConfig
    path: NoisePath
    times: tuple[float, ...]
    from_start: bool = False

    def __call__(self, nets: Nets, batch: Batch, ctx: Ctx) -> Tensor:
        """x0 (B, C, *S) of `sample`."""
        return self.sample(nets, batch, ctx).x0

    def sample(self, nets: Nets, batch: Batch, ctx: Ctx) -> Sample:
        """The student's sample at one step of `times`, the same step on every rank.

        Only the last call carries gradients, where the caller's grad mode allows them.
        """
        return self.sample_at(nets, batch, ctx, self.draw_step(ctx))

    @property
    def shown(self) -> bool:
        """Whether x0 of a trained step is an image that sampling makes: of the last one, or of any
        that is noised anew."""
        config = self.config
        return config.sampler == "renoise" or config.trained_step == "last" or len(self.times) == 1

    def draw_step(self, ctx: Ctx) -> int:
        """The step that the gradient reaches, the same on every rank."""
        last = len(self.times) - 1
        return last if self.config.trained_step == "last" else ctx.shared_randint(0, last + 1)

    def sample_at(self, nets: Nets, batch: Batch, ctx: Ctx, k: int) -> Sample:
        """The student's sample at step k; see `sample`."""
        with torch.no_grad():
            x = self.input(nets, batch, ctx, k)
        pred = nets["student"](x, ctx.times(self.times[k], batch.bsz), batch.cond)
        return Sample(pred.x0, batch.cond, x, pred.t)

    def from_data(self, nets: Nets, batch: Batch, ctx: Ctx, t: Tensor, pure: Tensor) -> Sample:
        """The student's sample in one call at t (B,) from noised images, or where `pure` (B,) from
        pure noise."""
        x0 = batch.x0
        assert x0 is not None, "the trainer checks `needs`"
        noise = ctx.randn(tuple(x0.shape))
        x_t = torch.where(rows(pure, x0), self.path.prior(noise), self.path.noised(x0, noise, t))
        pred = nets["student"](x_t, t, batch.cond)
        return Sample(pred.x0, batch.cond, x_t, pred.t)

    def input(self, nets: Nets, batch: Batch, ctx: Ctx, k: int) -> Tensor:
        """The student's input (B, C, *S) at step k."""
        shape, times = (batch.bsz, *batch.shape), self.times
        x = self.path.prior(ctx.randn(shape))
        if self.from_start:  # noise is drawn all the same: other draws stay where they are
            x = batch.extra[START].float()
        if k == 0:
            return x
        if self.config.rollout == "data":
            assert batch.x0 is not None, "rollout 'data' needs x0"
            return self.path.add_noise(batch.x0, ctx.randn(shape), ctx.times(times[k], batch.bsz))
        for now, later in pairwise(times[: k + 1]):
            t, s = ctx.times(now, batch.bsz), ctx.times(later, batch.bsz)
            pred = nets["student"](x, t, batch.cond)
            ode = self.config.sampler == "ode"
            x = pred.step(s) if ode else self.path.add_noise(pred.x0, ctx.randn(shape), s)
        return x
