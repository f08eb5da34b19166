"""Analytic students, fakes and recorders for tests of distribution matching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, VEPath, VPPath, expand
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores import ScoreDistillation
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

VP = VPPath.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2)
PATHS: dict[str, NoisePath] = {"vp": VP, "flow": FlowPath(), "ve": VEPath(sigma_max=10.0)}
BSZ = 64


class Gaussian(AnalyticDenoiser):
    """Exact denoiser of N(b, C) in D dimensions, b and C read afresh at every call."""

    def __init__(
        self, path: NoisePath, law: Callable[[], tuple[Tensor, Tensor]], kind: str = "x0"
    ) -> None:
        super().__init__(path, kind)  # type: ignore[arg-type]
        self.law = law

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mean, cov = (x.to(x_t) for x in self.law())
        alpha, sigma = (c.to(x_t) for c in self.path.coeffs(t))
        eye = torch.eye(len(mean)).to(x_t)
        var = alpha.view(-1, 1, 1) ** 2 * cov + sigma.view(-1, 1, 1) ** 2 * eye  # (B, D, D)
        delta = (x_t - expand(alpha, x_t) * mean).unsqueeze(-1)
        return mean + expand(alpha, x_t) * (cov @ torch.linalg.solve(var, delta)).squeeze(-1)


class Affine(AnalyticDenoiser):
    """One-step generator x0 = A z + b of unit noise z; `law` is the law of its samples."""

    def __init__(self, path: NoisePath, weight: Tensor, bias: Tensor) -> None:
        super().__init__(path)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.std = path.prior(torch.ones(1)).item()

    def law(self) -> tuple[Tensor, Tensor]:
        weight = self.weight.detach()
        return self.bias.detach(), weight @ weight.T

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return (x_t / self.std).to(self.weight.dtype) @ self.weight.T + self.bias


class Leaf(AnalyticDenoiser):
    """A student whose x0 is a parameter, so that its gradient is the gradient on x0."""

    def __init__(self, path: NoisePath, x0: Tensor) -> None:
        super().__init__(path)
        self.x0 = nn.Parameter(x0)

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return self.x0 + 0.0 * x_t


class Recorder(Denoiser):
    """Passes calls on and keeps what was asked."""

    def __init__(self, inner: Denoiser) -> None:
        self.inner, self.path, self.kind = inner, inner.path, inner.kind
        self.calls: list[tuple[Tensor, Tensor, Cond, bool]] = []

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls.append((x_t.detach(), t, cond, torch.is_grad_enabled()))
        return self.inner.raw(x_t, t, cond, w, features)


class Net(nn.Module):
    """Weights of a small denoiser with a hidden feature, for tests of who is trained."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.into = nn.Parameter(torch.randn(3, 2, generator=generator))
        self.out = nn.Parameter(0.3 * torch.randn(2, 3, generator=generator))


class NetDenoiser(Denoiser):
    """x0 = x_t + W_out tanh(W_in x_t); its one feature is the tanh."""

    def __init__(self, path: NoisePath, net: Net) -> None:
        self.path, self.kind, self.net = path, "x0", net

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = torch.tanh(x_t @ self.net.into.T)
        return x_t + hidden @ self.net.out.T, dict.fromkeys(features, hidden)


class LinearHead(nn.Module):
    """(B, 3) feature -> (B, 1) logit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.5, -1.0, 2.0]]))

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features["mid"] @ self.weight.T


def make(path: NoisePath, kind: str = "x0", teacher_shift: float = 1.0, **config: object) -> DMD2:
    config = {"guidance": 1.0, **config}
    return DMD2(DMD2Config(**config), Setting(path, kind, teacher_shift))  # type: ignore[arg-type]


def closed_form(
    method: ScoreDistillation[Any], nets: AnalyticNets, path: NoisePath, leaf: Leaf, *stds: float
) -> tuple[Tensor, list[Tensor]]:
    """(x0, its posterior means of N(the condition's mean, std^2) for each std), with graph to x0,
    at the noised samples that a student update of the method draws."""
    ctx = Ctx(phase="student")
    method.sample(nets, batch_of(), ctx)
    x0 = leaf.x0.detach().clone().requires_grad_()
    x_t, t, _ = method.noised(ctx, Sample(x0, batch_of().cond), method.config.dm_t_range)
    a, b = (expand(c, x_t) for c in path.coeffs(t))
    mean = batch_of().cond["mean"]
    gains = [a * std**2 / (a**2 * std**2 + b**2) for std in stds]
    return x0, [mean + gain * (x_t - a * mean) for gain in gains]


def batch_of(bsz: int = BSZ, dim: int = 2, x0: Tensor | None = None) -> Batch:
    rows = torch.arange(bsz, dtype=torch.float32)[:, None].expand(bsz, dim)
    return Batch(Cond({"mean": rows}), Cond({"mean": 0 * rows}), (dim,), x0)


def student_loss(method: DMD2, nets: AnalyticNets, batch: Batch, ctx: Ctx | None = None) -> Losses:
    return method.phases(0)[0].loss(nets, batch, ctx or Ctx(phase="student"))


def fake_loss(method: DMD2, nets: AnalyticNets, batch: Batch, ctx: Ctx) -> Losses:
    return method.phases(0)[1].loss(nets, batch, ctx)


def fake_nets(path: NoisePath) -> tuple[Recorder, Recorder, AnalyticNets]:
    student = Recorder(Affine(path, torch.eye(2), torch.zeros(2)))
    fake = Recorder(GaussianTeacher(path, 0.6))
    teacher = GaussianTeacher(path, 0.6)
    return student, fake, AnalyticNets({"student": student, "teacher": teacher, "fake": fake})
