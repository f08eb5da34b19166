"""Gaussian students whose deterministic jumps are the exact flow map, and the batches they see."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.path import FlowPath, VPPath, expand
from stepdistill.core.types import Batch, Cond
from stepdistill.methods.trajectory import TrajectoryMethod
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
VP, FLOW = VPPath.from_betas(BETAS), FlowPath()
SETTINGS = {"vp": (VP, 1.0), "flow": (FLOW, 1.0), "flow_shifted": (FLOW, 3.0)}
SHAPE = (2, 2, 2)


class Ctx64(Ctx):
    """Float64 noise, so that residuals of 1e-12 can be told from rounding."""

    def randn(self, shape: tuple[int, ...]) -> Tensor:
        return super().randn(shape).double()


def batch(bsz: int = 64, mean: float = 0.7, null: float = 0.0, std: float = 0.0) -> Batch:
    """Float64 samples of N(mean, std^2) with their condition."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(bsz, *SHAPE, generator=generator, dtype=torch.float64)

    def cond(value: float) -> Cond:
        return Cond({"mean": torch.full((bsz, *SHAPE), value, dtype=torch.float64)})

    return Batch(cond(mean), cond(null), SHAPE, x0=mean + std * noise)


class Linear(nn.Module):
    """One logit: w times the mean of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.w * features["mid"].flatten(1).mean(1, keepdim=True)


def reach(path, x_t: Tensor, x_s: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The x0 (B, C, *S) whose deterministic step from x_t at t is x_s at s < t."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = path.coeffs(t), path.coeffs(s)
    ratio = sigma_s / sigma_t.clamp_min(1e-12)
    gain = (alpha_s - ratio * alpha_t).clamp_min(1e-12)
    return (x_s - expand(ratio, x_t) * x_t) / expand(gain, x_t)


class ExactJumper(AnalyticDenoiser):
    """The exact flow map from t to the end it is told, else end_of(t), plus an error on x0.

    It denoises where the end is t. end_of: t (B,) -> (B,). error: t shaped as x_t -> added to x0.
    """

    def __init__(
        self,
        path,
        std: float,
        end_of: Callable[[Tensor], Tensor] | None = None,
        error=None,
        scale=1.0,
    ):
        super().__init__(path, "x0")
        self.std, self.end_of, self.error, self.scale = std, end_of, error, scale
        self.seen: list[tuple[Tensor, Tensor]] = []

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen.append((x_t, t))
        end, mean = self.end, Cond({"mean": self.scale * cond["mean"]})
        teacher = GaussianTeacher(self.path, self.std)
        if end is None:
            end = self.end_of(t)
        x_s = teacher.flow_map(x_t, t, end, mean)
        x0 = reach(self.path, x_t, x_s, t, end)
        if self.end is not None:
            stays = (end == t).view(-1, *([1] * (x_t.ndim - 1)))
            x0 = torch.where(stays, teacher.posterior_mean(x_t, t, mean), x0)
        return x0 if self.error is None else x0 + self.error(expand(t, x_t))


def loss_of(method: TrajectoryMethod, student: Denoiser, data: Batch, std: float, **ctx) -> Tensor:
    teacher = GaussianTeacher(method.setting.path, std)
    nets = AnalyticNets({"teacher": teacher, "student": student, "target": student})
    return method.student_loss(nets, data, Ctx64(**{"seed": 1, "max_steps": 1000, **ctx})).total


def solver_loss(method: TrajectoryMethod, student: Denoiser, std: float, floor: float) -> Tensor:
    """The l2 loss over starts in the noisier part of the grid, above share `floor` of it.

    A VP table leaps from clean data to sigma 0.03 in its first entry, whatever the grid: only above
    that does a step's error fall with the grid's spacing.
    """
    teacher = GaussianTeacher(method.setting.path, std)
    nets = AnalyticNets({"teacher": teacher, "student": student})
    both = method.jumps(nets, batch(8192, std=std), Ctx64(seed=1, max_steps=1000))
    kept = both.index >= floor * method.config.num_grid
    return (both.estimate - both.target)[kept].square().mean()
