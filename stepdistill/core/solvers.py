"""Solvers over a Denoiser: guided teacher steps, whole trajectories, and the few-step sampler.

SamplerSpec is the contract between a method (which grid, which noise rule), validation, export and
the stock scheduler that has to reproduce it.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from stepdistill.core.causal import Following
from stepdistill.core.denoiser import Denoiser, Prediction, is_guided
from stepdistill.core.path import VEPath, expand, flow_time, full
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond

SamplerKind = Literal["ode", "renoise", "tcd", "anchored"]
# (teacher, x_t, t, s, cond, null, guidance) -> x_s without graph, as `teacher_step`.
Solver = Callable[
    [Denoiser, Tensor, Tensor, Tensor, Cond, Cond | None, float | Tensor | None], Tensor
]


@dataclass(frozen=True)
class SamplerSpec:
    """How a student is sampled.

    times: descending visiting times, the network's calls; after the last one comes x0.
    kind:  "ode" deterministic steps; "renoise" x0 then fresh noise to the next time (LCM, DMD2);
           "tcd" deterministic to (1 - gamma) of the next time, then noise travel (TCD);
           "anchored" the deterministic step of this x0 from the FIRST state to the next time
           (arXiv:2405.20320, Sec. 4).
    heun: each step but the last is taken anew with the mean of the flows at its two ends, of kinds
           ode and anchored: 2 N - 1 calls (released code of arXiv:2405.20320).
    multistep: each step but the first follows the line through its own flow and the one before, of
           kind ode: Adams and Bashforth's second order, in no more calls.
    trained_times: every time the student was trained at; None where that is all of (0, 1].
           Times outside it are refused.
    guidance: classifier-free guidance still needed at inference; 1 for guidance folded in.
    w: guidance told to the network's own embedding (w = g - 1), None where it has none.
    boundary_scale: LCM's timestep scaling of the skip/out blend, None for plain x0.
    boundary_sigma: CD's sigma_min (VE paths), where its skip/out blend ends and noise travel
           begins; None for plain x0.
    keeps_scheduler: the student serves the teacher's own scheduler, and export leaves it in place.
    tells_end: the network is told where each step ends, which no stock pipeline does.
    chunk: latent frames of a chunk of a causal video student, which follows its own clean frames; 0
        makes all frames at once.
    grid: all times of a grid that another expert has the rest of; none where `times` are all.
    """

    times: tuple[float, ...]
    kind: SamplerKind = "renoise"
    trained_times: tuple[float, ...] | None = None
    guidance: float = 1.0
    w: float | None = None
    gamma: float = 0.0
    boundary_scale: float | None = None
    boundary_sigma: float | None = None
    keeps_scheduler: bool = False
    heun: bool = False
    multistep: bool = False
    tells_end: bool = False
    grid: tuple[float, ...] = ()
    chunk: int = 0

    def __post_init__(self) -> None:
        if not self.times or any(a <= b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"SamplerSpec: expected descending times, got {self.times}.")
        if self.heun and (self.kind not in ("ode", "anchored") or self.blends):
            raise ValueError(
                f"SamplerSpec: expected heun with kind ode or anchored and plain x0, got {self}."
            )
        if self.multistep and (self.kind != "ode" or self.heun or self.blends):
            raise ValueError(
                f"SamplerSpec: expected multistep with kind ode and plain x0, without heun, got "
                f"{self}."
            )
        if self.trained_times is not None:
            extra = [t for t in self.times if min(abs(t - u) for u in self.trained_times) > 1e-6]
            if extra:
                raise ValueError(
                    f"SamplerSpec: expected times from the trained grid {self.trained_times}, "
                    f"got {extra} besides. Sample with a number of steps the run was trained for."
                )

    @property
    def blends(self) -> bool:
        """Whether the network's x0 is mixed with its input, as consistency models do."""
        return self.boundary_scale is not None or self.boundary_sigma is not None

    @property
    def num_steps(self) -> int:
        return len(self.times)

    @property
    def num_calls(self) -> int:
        """Network calls of one image, each of two batch rows where it is guided."""
        return 2 * len(self.times) - 1 if self.heun else len(self.times)

    @property
    def hands_over(self) -> float:
        """The time at which another expert goes on; 0 where clean data come after the last call."""
        if not self.grid:
            return 0.0
        return (*self.grid, 0.0)[self.grid.index(self.times[-1]) + 1]

    @property
    def whole(self) -> SamplerSpec:
        """The sampler of both experts' students."""
        return (
            replace(self, times=self.grid, trained_times=self.grid, grid=()) if self.grid else self
        )

    def with_steps(self, num_steps: int, shift: float = 1.0) -> SamplerSpec:
        """The same rule on the uniform grid of num_steps. Errors: ValueError off the grid."""
        return replace(self, times=uniform_grid(num_steps, shift))


def boundary_coeffs(t: Tensor, scale: float, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of LCM at table index t (B,): exactly (1, 0) at t = 0.

    Source: Luo et al. 2023, arXiv:2310.04378, Sec. 4.1, with the released timestep scaling.
    """
    z = scale * t.double()
    c_skip = sigma_data**2 / (z**2 + sigma_data**2)
    return c_skip, z / (z**2 + sigma_data**2).sqrt()


def cd_boundary_coeffs(
    sigma: Tensor, sigma_min: float, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(skip, out) of CD at sigma (B,), applied to x and the denoised x0: (1, 0) at sigma_min.

    Source: Song et al. 2023, arXiv:2303.01469, Appendix C, where F of the shifted c_skip x +
    c_out F is read from the EDM denoiser x0 = c_skip x + c_out F. At sigma_min = 0: (0, 1).
    """
    out = 1.0 - sigma_min / sigma
    shifted = sigma_data**2 / ((sigma - sigma_min) ** 2 + sigma_data**2)
    return shifted - out * sigma_data**2 / (sigma**2 + sigma_data**2), out


def boundary_x0(pred: Prediction, scale: float | None, sigma_min: float | None) -> Tensor:
    """x0 (B, C, *S) under LCM's skip/out (scale), under CD's (sigma_min), or plain (neither)."""
    x0 = pred.x0
    if scale is not None:
        skip, out = boundary_coeffs(pred.path.entry(pred.t), scale)
    elif sigma_min is not None:
        skip, out = cd_boundary_coeffs(pred.path.coeffs(pred.t)[1], sigma_min)
    else:
        return x0
    return expand(skip, x0) * full(pred.x_t) + expand(out, x0) * x0


def teacher_step(
    teacher: Denoiser,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Cond,
    null: Cond | None,
    guidance: float | Tensor | None,
) -> Tensor:
    """x_s (B, C, *S) after one deterministic step of the guided teacher, without gradients."""
    with torch.no_grad():
        return teacher(x_t, t, cond, null, guidance).step(s)


@torch.no_grad()
def stochastic_step(
    teacher: Denoiser,
    x_t: Tensor,
    t: Tensor,
    s: Tensor,
    cond: Cond,
    null: Cond | None,
    guidance: float | Tensor | None,
    *,
    eta: float,
    num_steps: int,
    randn: Callable[[tuple[int, ...]], Tensor],
) -> Tensor:
    """x_s (B, C, *S) after num_steps equal steps of the guided teacher's SDE, without gradients.

    Fresh noise of strength eta at each: eta = 0 is the ODE, 1 the reverse SDE, and all have the
    same marginals. On N(mu, std^2) data, with V = alpha^2 std^2 + sigma^2, many steps end at
        x_s - alpha_s mu = r (x_t - alpha_t mu) + sqrt(V_s - r^2 V_t) noise,
        r = sqrt(V_s / V_t) (alpha_t / alpha_s sqrt(V_s / V_t))^(eta^2).
    Source: Song et al. 2021, arXiv:2010.02502, Eq. 16; Liu et al. 2024, arXiv:2403.01505, Sec. 3.
    Args: randn: draws standard normal noise of a shape, as `Ctx.randn`.
    """
    path = teacher.path
    for i in range(1, num_steps + 1):
        later = s if i == num_steps else path.snap(t + (s - t) / (num_steps + 1 - i))
        pred = teacher(x_t, t, cond, null, guidance)
        x_t = pred.step(later, eta, randn(tuple(x_t.shape)) if eta > 0.0 else None)
        t = later
    return x_t


def ode_solve(
    denoiser: Denoiser,
    noise: Tensor,
    cond: Cond,
    null: Cond | None = None,
    guidance: float | Tensor | None = None,
    times: tuple[float, ...] = uniform_grid(50),
) -> Tensor:
    """x0 (B, C, *S) of a deterministic trajectory from unit noise over `times`, then to 0."""
    spec = SamplerSpec(times, "ode")
    return sample_x0(denoiser, spec, noise, cond, null, guidance)


@torch.no_grad()
def ode_invert(
    denoiser: Denoiser,
    x0: Tensor,
    cond: Cond,
    null: Cond | None = None,
    guidance: float | Tensor | None = None,
    times: tuple[float, ...] = uniform_grid(64),
) -> Tensor:
    """Unit noise (B, C, *S) whose deterministic trajectory ends at x0: from 0 up to times[0].

    Heun's rule on dx/dtau = flow in x / (alpha + sigma), tau = sigma / (alpha + sigma), on every
    path. At t = 0, where no network was trained, flow is -x0: clean data tell nothing of noise.
    2 N - 1 calls. On a VE path times below sigma_min are left out.
    Source: Lee et al. 2024, arXiv:2405.20320, config G (real images through the teacher's ODE).
    Args: times: descending, as `ode_solve` takes them back.
    """
    path, bsz = denoiser.path, x0.shape[0]

    def coeffs(t: float) -> tuple[Tensor, float, float]:
        at = torch.full((bsz,), t, dtype=torch.float64, device=x0.device)
        alpha, sigma = (float(c[0]) for c in path.coeffs(at))
        return at, alpha + sigma, sigma / (alpha + sigma)

    rising = sorted(times)
    if isinstance(path, VEPath):
        rising = [t for t in rising if t >= path.lowest - 1e-12]
    y, tau, slope = full(x0), 0.0, -full(x0)
    for i, t in enumerate(rising):
        at, scale, later = coeffs(t)

        def flow(y: Tensor, at: Tensor = at, scale: float = scale) -> Tensor:
            return denoiser(y * scale, at, cond, null, guidance).flow

        mean = 0.5 * (slope + flow(y + (later - tau) * slope))
        y, tau = y + (later - tau) * mean, later
        if i + 1 < len(rising):
            slope = flow(y)
    x = y * scale
    return x / path.prior(torch.ones((), dtype=x.dtype, device=x.device))


@torch.no_grad()
def one_call_x0(
    denoiser: Denoiser,
    spec: SamplerSpec,
    x_t: Tensor,
    t: Tensor,
    cond: Cond,
    null: Cond | None = None,
) -> Tensor:
    """x0 (B, C, *S) of a student's single call at t (B,), as its sampler's last step makes it."""
    w = None if spec.w is None else torch.full_like(t, spec.w).float()
    end = torch.zeros_like(t) if spec.tells_end else None
    pred = denoiser(x_t, t, cond, null, spec.guidance, w=w, s=end)
    return boundary_x0(pred, spec.boundary_scale, spec.boundary_sigma)


def sample_x0(
    denoiser: Denoiser,
    spec: SamplerSpec,
    noise: Tensor,
    cond: Cond,
    null: Cond | None = None,
    guidance: float | Tensor | None = None,
    fresh_noise: Callable[[int], Tensor] | None = None,
    gradient_at: int | None = None,
    until: float = 0.0,
) -> Tensor:
    """x0 (B, C, *S): the student's (or teacher's) sampler, the one loop used everywhere.

    Args:
        noise: (B, C, *S) unit normal. guidance: overrides the spec's where given.
        fresh_noise: step index -> (B, C, *S), needed by "renoise" and "tcd" beyond one step.
        gradient_at: the step whose call alone has a graph, and whose x0 is returned.
        until: the time where sampling stops; above 0 the state there is returned, not x0.
    """
    if spec.chunk:
        return _by_chunks(denoiser, spec, noise, cond, null, guidance, fresh_noise, gradient_at)
    path, bsz = denoiser.path, noise.shape[0]
    guidance = spec.guidance if guidance is None else guidance

    def at(t: float) -> Tensor:
        return torch.full((bsz,), t, dtype=torch.float64, device=noise.device)

    w = None if spec.w is None else at(spec.w).float()
    clean = 0.0  # where the network's answers stand
    if spec.boundary_sigma is not None:
        assert isinstance(path, VEPath), "cd's boundary is a VE path's"
        clean = float(path.time_of_sigma(torch.tensor(spec.boundary_sigma, dtype=torch.float64)))
    x = first = path.prior(noise)
    before: tuple[Tensor, Tensor] | None = None  # flow and rectified time of the last call
    ends = (*spec.times[1:], until)
    for i, (t, s) in enumerate(zip(spec.times, ends, strict=True)):
        cleaner = path.before_travel(at(s), spec.gamma if spec.kind == "tcd" else 0.0)
        ends_at = at(clean) if spec.kind == "renoise" else cleaner
        end = ends_at if spec.tells_end else None
        with torch.set_grad_enabled(i == gradient_at):
            pred = denoiser(x, at(t), cond, null, guidance, w=w, s=end)
            x0 = boundary_x0(pred, spec.boundary_scale, spec.boundary_sigma)
        if spec.multistep:
            tau, later = (flow_time(path, at(one)) for one in (t, s))
            if before is not None:
                slope = expand((later - tau) / (2.0 * (tau - before[1])), x0)
                x0 = path.to_x0(pred.flow + slope * (pred.flow - before[0]), x, at(t), "flow")
            before = pred.flow, tau
        if s == 0.0 or i == gradient_at:
            return x0
        if spec.kind in ("ode", "anchored"):
            base = (x, at(t)) if spec.kind == "ode" else (first, at(spec.times[0]))
            later = path.step(x0, *base, at(s))
            if spec.heun:
                last = denoiser(later, at(s), cond, null, guidance, w=w)
                x0 = path.to_x0(0.5 * (pred.flow + last.flow), x, at(t), "flow")
                later = path.step(x0, *base, at(s))
            x = later
            continue
        if fresh_noise is None:
            raise ValueError(f"sample_x0: expected fresh_noise with kind {spec.kind!r}, got None.")
        if spec.kind == "renoise":
            x = path.renoise(x0, at(clean), at(s), fresh_noise(i))
        else:
            x = path.renoise(path.step(x0, x, at(t), cleaner), cleaner, at(s), fresh_noise(i))
    return x


def _by_chunks(
    denoiser: Denoiser,
    spec: SamplerSpec,
    noise: Tensor,
    cond: Cond,
    null: Cond | None,
    guidance: float | Tensor | None,
    fresh_noise: Callable[[int], Tensor] | None,
    gradient_at: int | None,
) -> Tensor:
    """x0 (B, C, F, H, W) of `sample_x0`, each chunk of frames behind those made before it.

    The past is remembered by networks that can, but where a guided call needs it anew.
    """
    made, one = noise[:, :, :0], replace(spec, chunk=0)
    g = spec.guidance if guidance is None else guidance
    with nullcontext() if is_guided(g) else denoiser.remembered() as remember:
        for start in range(0, noise.shape[2], spec.chunk):
            part = slice(start, start + spec.chunk)

            def fresh(step: int, part: slice = part) -> Tensor:
                assert fresh_noise is not None, "asked for where it is given"
                return fresh_noise(step)[:, :, part]

            asked = denoiser if remember is not None else Following(denoiser, made.detach())
            drawn = None if fresh_noise is None else fresh
            how = (cond, null, guidance, drawn, gradient_at)
            x0 = sample_x0(asked, one, noise[:, :, part], *how)
            if remember is not None and part.stop < noise.shape[2]:
                remember(x0.detach(), cond)
            made = torch.cat([made, x0], dim=2)
    return made
