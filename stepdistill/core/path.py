"""Gaussian noise paths x_t = alpha(t) x0 + sigma(t) eps, with t in [0, 1]: 0 data, 1 noise.

One object answers every question about noise levels: mixing, noise travel, conversion between
predictions, the deterministic or stochastic step, and the time the network is told. Schedules
are kept in float64; path maths runs in float32 or better, whatever the input.

    x0 from eps:  (x_t - sigma eps) / alpha            v    = alpha eps - sigma x0
    x0 from v:    (alpha x_t - sigma v) / (alpha^2 + sigma^2)
    x0 from flow: (x_t - sigma flow) / (alpha + sigma)  flow = eps - x0
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W). t, s: (B,) everywhere.

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import get_args

import torch
from torch import Tensor

from stepdistill.core.options import PredictionType

PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)


def full(x: Tensor) -> Tensor:
    """x in float32, or unchanged where it is float32 or float64 already."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rows(mask: Tensor, like: Tensor) -> Tensor:
    """(B,) mask shaped to broadcast over `like` (B, C, *S); (B, F), by frame, over a video."""
    if mask.ndim == 2:
        return mask.view(mask.shape[0], 1, mask.shape[1], 1, 1)
    return mask.view(-1, *([1] * (like.ndim - 1)))


def expand(coeff: Tensor, like: Tensor) -> Tensor:
    """(B,) coefficients shaped to broadcast over `like` (B, C, *S), in its (full) dtype."""
    return rows(coeff.to(like.dtype), like)


class NoisePath(ABC):
    """Base of the three paths. Subclasses say alpha, sigma and the network's time."""

    @abstractmethod
    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each (B,) float64, at times t (B,)."""

    @abstractmethod
    def model_time(self, t: Tensor) -> Tensor:
        """(B,) the time value the network is conditioned on at t."""

    @abstractmethod
    def time_of(self, model_time: float | Tensor) -> Tensor:
        """The time t at which the network is told that (inverse of model_time)."""

    def entry(self, t: Tensor) -> Tensor:
        """(B,) what a stock scheduler calls the time: here what the network is told."""
        return self.model_time(t)

    def as_flow(self) -> FlowPath:
        """The rectified-flow path of a network that is told time in this one's units."""
        return FlowPath()

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time the teacher was trained at; t itself on a continuous path."""
        return t.double()

    def before_travel(self, s: Tensor, gamma: float) -> Tensor:
        """(1 - gamma) s (B,), the cleaner time from which TCD's noise travel goes back to s."""
        return (1.0 - gamma) * s.double()

    def prior(self, noise: Tensor) -> Tensor:
        """Where sampling starts: unit noise for VP and flow, sigma_max * noise for VE."""
        return noise

    def line_to_prior(
        self, x0: Tensor, noise: Tensor, t: Tensor, start: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """(x_t, eps) of the line x_t = alpha x0 + sigma eps that is prior(noise) at time `start`.

        So eps = (prior - alpha_start x0) / sigma_start, the noise itself on a flow path from t = 1.
        Sampling begins without the trace of x0 that a VP table's last entry or sigma_max leaves;
        a student that answers x0 throughout is then led along this line by `step`, up to `start`
        and in x / (alpha + sigma) a straight one.
        Args: x0, noise: (B, C, *S) a coupled pair. t: (B,), where above `start` the prior stays.
        """
        x0, first = full(x0), full(self.prior(noise))
        alpha, sigma = (expand(c, x0) for c in self.coeffs(torch.full_like(t, start)))
        eps = (first - alpha * x0) / sigma
        return torch.where(rows(t >= start, x0), first, self.add_noise(x0, eps, t)), eps

    def log_snr(self, t: Tensor) -> Tensor:
        """(B,) log(alpha^2 / sigma^2); +inf at t=0."""
        alpha, sigma = self.coeffs(t)
        return 2.0 * (alpha.log() - sigma.log())

    # ------------------------------------------------------------------ noise
    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, *S) = alpha x0 + sigma eps."""
        x0, eps = full(x0), full(eps)
        alpha, sigma = self.coeffs(t)
        return expand(alpha, x0) * x0 + expand(sigma, x0) * eps

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, *S) to train at: add_noise, but pure noise at t = 1, as sampling starts there.

        The last entry of a table has an alpha above 0 and sigma_max is finite: add_noise would
        leave a trace of x0 that no sampler's first input has.
        """
        x_t = self.add_noise(x0, eps, t)
        first = t >= 1.0 - 1e-9
        return torch.where(rows(first, x_t), self.prior(full(eps)).to(x_t.dtype), x_t)

    def renoise(self, x_t: Tensor, t: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """x_s at the noisier time s >= t, by the forward kernel q(x_s | x_t).

        r = alpha_s / alpha_t, variance sigma_s^2 - r^2 sigma_t^2. Never add_noise(x_t, ...), which
        would count the noise already in x_t twice.
        Errors: ValueError where some s < t; on the CPU alone, elsewhere the check would wait for
            the device.
        """
        if s.device.type == "cpu" and bool((s < t).any()):
            raise ValueError("renoise: expected s >= t (noise travel only adds noise), got s < t.")
        x_t, noise = full(x_t), full(noise)
        ratio, std = self.travel(t, s)
        return expand(ratio, x_t) * x_t + expand(std, x_t) * noise

    def travel(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(r, std), each (B,), of the forward kernel q(x_s | x_t) = N(r x_t, std^2), s >= t."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.coeffs(t), self.coeffs(s)
        # At zero terminal SNR alpha_t may be 0; then s = t and the kernel is the identity.
        ratio = torch.where(
            alpha_t > 0, alpha_s / alpha_t.clamp_min(1e-300), torch.ones_like(alpha_t)
        )
        return ratio, (sigma_s**2 - ratio**2 * sigma_t**2).clamp_min(0.0).sqrt()

    # ------------------------------------------------------------ predictions
    def to_x0(self, out: Tensor, x_t: Tensor, t: Tensor, src: PredictionType) -> Tensor:
        """x0 (B, C, *S) from a network output of type `src` at x_t."""
        out, x_t = full(out), full(x_t)
        alpha, sigma = (expand(c, x_t) for c in self.coeffs(t))
        if src == "x0":
            return out
        if src == "eps":
            return (x_t - sigma * out) / alpha
        if src == "v":
            return (alpha * x_t - sigma * out) / (alpha**2 + sigma**2)
        if src == "flow":
            return (x_t - sigma * out) / (alpha + sigma)
        raise ValueError(f"to_x0: expected one of {PREDICTION_TYPES}, got {src!r}.")

    def convert(
        self, out: Tensor, x_t: Tensor, t: Tensor, src: PredictionType, dst: PredictionType
    ) -> Tensor:
        """A prediction of type `src` at x_t as type `dst`, always through x0.

        eps, v and flow are undefined at sigma = 0 (t=0): a sample there is x0 itself.
        """
        if src == dst:
            return full(out)
        x0, x_t = self.to_x0(out, x_t, t, src), full(x_t)
        if dst == "x0":
            return x0
        alpha, sigma = (expand(c, x_t) for c in self.coeffs(t))
        eps = (x_t - alpha * x0) / sigma
        if dst == "eps":
            return eps
        if dst == "v":
            return alpha * eps - sigma * x0
        if dst == "flow":
            return eps - x0
        raise ValueError(f"convert: expected one of {PREDICTION_TYPES}, got {dst!r}.")

    def step(
        self,
        x0: Tensor,
        x_t: Tensor,
        t: Tensor,
        s: Tensor,
        eta: float = 0.0,
        noise: Tensor | None = None,
    ) -> Tensor:
        """x_s (B, C, *S) from a denoised x0 at x_t: the universal DDIM step.

        Source: Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16, written without the schedule:
        std^2 = eta^2 sigma_s^2 (1 - l_s^2 / l_t^2), l = sigma / alpha. On a flow path with eta=0
        it is Euler: x_t + (s - t) flow. s = t is the identity, s = 0 returns x0.
        """
        x0, x_t = full(x0), full(x_t)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.coeffs(t), self.coeffs(s)
        eps = (x_t - expand(alpha_t, x_t) * x0) / expand(sigma_t.clamp_min(1e-12), x_t)
        if eta == 0.0:
            return expand(alpha_s, x_t) * x0 + expand(sigma_s, x_t) * eps
        if noise is None:
            raise ValueError("step: expected noise with eta > 0, got None. Draw it from ctx.randn.")
        snr_ratio = (sigma_s * alpha_t / (alpha_s * sigma_t).clamp_min(1e-300)) ** 2
        std = (eta**2 * sigma_s**2 * (1.0 - snr_ratio)).clamp_min(0.0).sqrt()
        mean_std = (sigma_s**2 - std**2).clamp_min(0.0).sqrt()
        mean = expand(alpha_s, x_t) * x0 + expand(mean_std, x_t) * eps
        return mean + expand(std, x_t) * full(noise)


class VPPath(NoisePath):
    """Variance-preserving table path of DDPM-type models: alpha^2 + sigma^2 = 1.

    Index n of the N-entry table sits at t = (n + 1) / N, and t = 0 is clean data. So a uniform grid
    (1, 3/4, 1/2, 1/4) is "trailing" spacing (999, 749, 499, 249), and j / 50 is LCM's solver grid.
    Between entries the angle atan2(sigma, alpha) is interpolated, which stays finite at zero
    terminal SNR. `snap` rounds a time to the table; the network's time is n = N t - 1.

    Args: alphas_cumprod: (N,) the scheduler's cumulative products, noise growing with the index.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        abar = alphas_cumprod.detach().double().cpu()
        if abar.ndim != 1 or bool((abar.diff() > 0).any()):
            raise ValueError("VPPath: expected a decreasing alphas_cumprod (N,), got another.")
        angle = torch.atan2((1.0 - abar).clamp_min(0.0).sqrt(), abar.clamp_min(0.0).sqrt())
        self.num_steps = abar.numel()
        self._angle = torch.cat([angle.new_zeros(1), angle])  # [n + 1] is index n, [0] clean

    @classmethod
    def from_betas(cls, betas: Tensor) -> VPPath:
        return cls(torch.cumprod(1.0 - betas.double(), dim=0))

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        if self._angle.device != t.device:
            self._angle = self._angle.to(t.device)
        position = t.double().clamp(0.0, 1.0) * self.num_steps
        low = position.floor().clamp_max(self.num_steps - 1).long()
        frac = position - low
        angle = self._angle[low] * (1.0 - frac) + self._angle[low + 1] * frac
        # cos(pi/2) is 6e-17, not 0: make zero terminal SNR exact.
        alpha = torch.where(angle >= math.pi / 2, torch.zeros_like(angle), angle.cos())
        return alpha, angle.sin()

    def model_time(self, t: Tensor) -> Tensor:
        """(B,) float64 n = N t - 1, integer where t is on the table, at least 0."""
        n = t.double() * self.num_steps - 1.0
        nearest = n.round()
        return torch.where((n - nearest).abs() < 1e-6, nearest, n).clamp_min(0.0)

    def snap(self, t: Tensor) -> Tensor:
        return (t.double() * self.num_steps).round().clamp(1, self.num_steps) / self.num_steps

    def before_travel(self, s: Tensor, gamma: float) -> Tensor:
        """See NoisePath: TCD's released rule on indices, floor((1 - gamma) n) in float32.

        Index 0 stands for clean data. No travel, so no rounding, at gamma = 0.
        """
        if gamma == 0.0:
            return s.double()
        index = ((1.0 - gamma) * self.entry(s).float()).floor().double()
        return torch.where(index > 0, (index + 1.0) / self.num_steps, 0.0)

    def time_of(self, model_time: float | Tensor) -> Tensor:
        """The time t of table index n (inverse of model_time)."""
        return (torch.as_tensor(model_time).double() + 1.0) / self.num_steps

    def time_of_angle(self, angle: Tensor) -> Tensor:
        """(B,) the time, between table entries too, whose atan2(sigma, alpha) is `angle`."""
        table, angle = self._angle.to(angle.device), angle.double()
        high = torch.searchsorted(table, angle).clamp(1, self.num_steps)
        low, span = table[high - 1], table[high] - table[high - 1]
        part = ((angle - low) / span.clamp_min(1e-300)).clamp(0.0, 1.0)
        return (high - 1 + part) / self.num_steps


class TrigPath(VPPath):
    """Stable Audio's path: alpha = cos(phi), sigma = sin(phi), phi = t atan(sigma_max).

    The network is told 2 phi / pi. EDM's x0 + s eps divided by sqrt(1 + s^2), sigma_data = 1, is
    this x_t with s = tan(phi), and their output -F is v. t = 1 is sigma_max, where sampling starts
    from unit noise. Continuous, and also the table of num_steps entries that stock VP schedulers
    are given: they count entries (`entry`), so a network under them is told those.
    Source: Evans et al. 2024, arXiv:2407.14358; Diffusers' CosineDPMSolverMultistepScheduler.
    """

    def __init__(self, sigma_max: float = 500.0, num_steps: int = 1000) -> None:
        self.last = math.atan(sigma_max)
        times = torch.arange(1, num_steps + 1, dtype=torch.float64) / num_steps
        super().__init__((self.last * times).cos() ** 2)

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.last * t.double().clamp(0.0, 1.0)
        return angle.cos(), angle.sin()

    def model_time(self, t: Tensor) -> Tensor:
        return t.double() * (2.0 * self.last / math.pi)

    def time_of(self, model_time: float | Tensor) -> Tensor:
        """See NoisePath."""
        return torch.as_tensor(model_time).double() * (0.5 * math.pi / self.last)

    def entry(self, t: Tensor) -> Tensor:
        return VPPath.model_time(self, t)

    def snap(self, t: Tensor) -> Tensor:
        return t.double()

    def as_flow(self) -> FlowPath:
        return FlowPath(1)


class FlowPath(NoisePath):
    """Rectified-flow path: alpha = 1 - t, sigma = t; the network is told 1000 t."""

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        self.num_train_timesteps = num_train_timesteps

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return 1.0 - t, t

    def model_time(self, t: Tensor) -> Tensor:
        return t.double() * self.num_train_timesteps

    def time_of(self, model_time: float | Tensor) -> Tensor:
        """See NoisePath."""
        return torch.as_tensor(model_time).double() / self.num_train_timesteps

    def as_flow(self) -> FlowPath:
        return FlowPath(self.num_train_timesteps)


class VEPath(NoisePath):
    """Variance-exploding path of EDM-type models: alpha = 1, sigma(t) = sigma_max * t^rho.

    A uniform grid in t is the Karras grid with sigma_min = 0 (Karras et al. 2022,
    arXiv:2206.00364, Eq. 5). The network's time is time_scale * log sigma (EDM: 1/4; CM: 250).
    """

    def __init__(
        self,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_min: float = 0.002,
        time_scale: float = 0.25,
    ) -> None:
        self.sigma_max, self.rho, self.sigma_min = sigma_max, rho, sigma_min
        self.time_scale = time_scale

    def coeffs(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double()
        return torch.ones_like(t), self.sigma_max * t**self.rho

    def model_time(self, t: Tensor) -> Tensor:
        return self.time_scale * self.coeffs(t)[1].clamp_min(self.sigma_min).log()

    @property
    def lowest(self) -> float:
        """The time of sigma_min, below which no teacher was trained and model_time stays."""
        return float((self.sigma_min / self.sigma_max) ** (1.0 / self.rho))

    def snap(self, t: Tensor) -> Tensor:
        return t.double().clamp_min(self.lowest)

    def prior(self, noise: Tensor) -> Tensor:
        return self.sigma_max * noise

    def time_of(self, model_time: float | Tensor) -> Tensor:
        """See NoisePath."""
        return self.time_of_sigma((torch.as_tensor(model_time).double() / self.time_scale).exp())

    def time_of_sigma(self, sigma: Tensor) -> Tensor:
        return (sigma.double() / self.sigma_max) ** (1.0 / self.rho)


def flow_time(path: NoisePath, t: Tensor) -> Tensor:
    """(B,) float64 rectified-flow time of path time t: sigma / (alpha + sigma)."""
    alpha, sigma = path.coeffs(t)
    return sigma / (alpha + sigma)
