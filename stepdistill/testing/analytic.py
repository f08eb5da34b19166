"""Teachers with exact posterior means: the oracle of every gradient test, and documentation.

For x0 ~ N(mu, std^2 I) and x_t = alpha x0 + sigma eps, with V = alpha^2 std^2 + sigma^2:
    E[x0 | x_t] = mu + (alpha std^2 / V) (x_t - alpha mu).
mu is read from cond["mean"], so guidance is exact too: guided means are mu_u + g (mu_c - mu_u).
"""

# Shapes: B batch, C channels, *S spatial, K components.

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Scorer
from stepdistill.core.path import NoisePath, PredictionType, expand, full
from stepdistill.core.types import Cond


class AnalyticDenoiser(Denoiser):
    """Base: subclasses give the posterior mean; the raw output is any prediction type of it."""

    def __init__(self, path: NoisePath, kind: PredictionType = "x0") -> None:
        self.path, self.kind = path, kind

    @abstractmethod
    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """E[x0 | x_t], (B, C, *S)."""

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See Denoiser.raw. Every feature asked for is x_t itself."""
        x0 = self.posterior_mean(full(x_t), t, cond)
        out = self.path.convert(x0, x_t, t, "x0", self.kind)
        return out, dict.fromkeys(features, x_t)


class GaussianTeacher(AnalyticDenoiser):
    """Data N(cond["mean"], std^2 I); cond["mean"] has the shape of x_t or broadcasts to it."""

    def __init__(self, path: NoisePath, std: float | Tensor, kind: PredictionType = "x0") -> None:
        super().__init__(path, kind)
        self.std = std

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        mean = cond["mean"].to(x_t.dtype)
        alpha, sigma = (expand(c, x_t) for c in self.path.coeffs(t))
        var = alpha**2 * self.std**2 + sigma**2
        return mean + (alpha * self.std**2 / var) * (x_t - alpha * mean)

    def flow_map(self, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond) -> Tensor:
        """x_s on the exact probability-flow trajectory: alpha_s mu + sqrt(V_s / V_t) d."""
        mean = cond["mean"].to(x_t.dtype)
        (alpha, sigma), (alpha_s, sigma_s) = self.path.coeffs(t), self.path.coeffs(s)
        alpha, sigma = expand(alpha, x_t), expand(sigma, x_t)
        alpha_s, sigma_s = expand(alpha_s, x_t), expand(sigma_s, x_t)
        var_t, var_s = alpha**2 * self.std**2 + sigma**2, alpha_s**2 * self.std**2 + sigma_s**2
        return alpha_s * mean + (var_s / var_t) ** 0.5 * (x_t - alpha * mean)


class MixtureTeacher(AnalyticDenoiser):
    """Data sum_k weights_k N(means_k, std^2 I); the condition is ignored.

    Args: means: (K, C, *S). weights: (K,), summing to 1.
    """

    def __init__(
        self,
        path: NoisePath,
        means: Tensor,
        std: float,
        weights: Tensor | None = None,
        kind: PredictionType = "x0",
    ) -> None:
        super().__init__(path, kind)
        self.means, self.std = means, std
        count = means.shape[0]
        self.weights = torch.full((count,), 1.0 / count) if weights is None else weights

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        alpha, sigma = (expand(c, x_t).unsqueeze(1) for c in self.path.coeffs(t))  # (B, 1, 1...)
        means = self.means.to(x_t).unsqueeze(0)  # (1, K, C, *S)
        var = alpha**2 * self.std**2 + sigma**2
        delta = x_t.unsqueeze(1) - alpha * means  # (B, K, C, *S)
        dims = tuple(range(2, delta.ndim))
        log_lik = -0.5 * (delta**2 / var).sum(dims) + self.weights.to(x_t).log()  # (B, K)
        resp = log_lik.softmax(1).view(*log_lik.shape, *([1] * len(dims)))
        return (resp * (means + (alpha * self.std**2 / var) * delta)).sum(1)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """(num, C, *S) draws of the data."""
        index = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        shape = (num, *self.means.shape[1:])
        return self.means[index] + self.std * torch.randn(shape, generator=generator)


class Blended(Denoiser):
    """(1 - share) one + share other, in the raw output of two networks of one kind."""

    def __init__(self, one: Denoiser, other: Denoiser, share: float) -> None:
        self.one, self.other, self.share = one, other, share
        self.path, self.kind = one.path, one.kind

    def raw(
        self, x_t: Tensor, t: Tensor, cond: Cond, w: Tensor | None, features: Sequence[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        one, other = (net.raw(x_t, t, cond, w, ())[0] for net in (self.one, self.other))
        return torch.lerp(one, other, self.share), {}


class AnalyticNets:
    """Roles by name for tests of losses: implements `core.method.Nets` without a RoleBank.

    heads: role -> module mapping a dict of features to logits (B, K).
    scorers: name -> judge of images; latents are their own images here.
    """

    def __init__(
        self,
        denoisers: Mapping[str, Denoiser],
        heads: Mapping[str, nn.Module] | None = None,
        scorers: Mapping[str, Scorer] | None = None,
    ) -> None:
        self._denoisers, self._heads = dict(denoisers), dict(heads or {})
        self._scorers = dict(scorers or {})
        self.ema_calls: list[tuple[str, float]] = []
        self.mixes: list[tuple[str, str, float]] = []

    def __getitem__(self, role: str) -> Denoiser:
        return self._denoisers[role]

    def head(self, role: str, features: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self._heads[role](features)
        return logits

    def images(self, latents: Tensor) -> Tensor:
        return latents

    def scorer(self, name: str) -> Scorer:
        return self._scorers[name]

    def ema_update(self, role: str, decay: float) -> None:
        self.ema_calls.append((role, decay))

    def mix(self, role: str, other: str, share: float) -> None:
        self.mixes.append((role, other, share))

    def carrying(self, role: str, other: str, share: float) -> AnalyticNets:
        """`role` as a blend of both predictions of x0: for small adapters, what weights do."""
        blended = Blended(self[role], self[other], share)
        return AnalyticNets({**self._denoisers, role: blended}, self._heads, self._scorers)
