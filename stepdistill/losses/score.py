"""Distribution matching: the difference of two denoised means, as a gradient on the sample.

For a generated x0 noised to x_t, `real` and `fake` are the x0 predictions of the teacher and of a
denoiser fitted to the generator. `fake - real` is proportional to the gradient in x0 of
KL(generator || data) at that noise level (Yin et al. 2023, arXiv:2311.18828, Eq. 7). Sign check:
score = -(x_t - alpha x0) / sigma^2, so score_fake - score_real = (alpha / sigma^2) (fake - real).

Differs from the paper: the released code, followed here, has no factor alpha in front of the
normalised difference (the same thing where alpha = 1); the normaliser is clamped at 1e-6.

Score gradients of what is optimised itself (an image, or a renderer's parameters) are one table of
coefficients, `COEFFICIENTS`, over six noise predictions at x_t, the fourth to sixth where named:
    cond e_c, null e_u, empty e_0, negative e_neg, fake e_f, noise e (the noise that made x_t).
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser, Prediction
from stepdistill.core.path import NoisePath, PredictionType, expand, full
from stepdistill.core.types import Cond
from stepdistill.losses.score_options import (
    GradientKind,
    GradientWeight,
    ScoreGradientConfig,
    annealed,
)

ScoreWeight = Literal["dmd_l1", "sigma2", "uniform"]
DenoisingSpace = Literal["native", "x0", "eps", "v", "flow"]
DenoisingWeight = Literal["none", "alpha2", "edm"]


def dmd_gradient(
    x0: Tensor,
    real: Tensor,
    fake: Tensor,
    weight: ScoreWeight = "dmd_l1",
    coeffs: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Weighted difference of fake and real denoised means, the gradient wanted on x0.

    weight:
        "dmd_l1"  divide by mean|x0 - real| of each sample: the generator output itself, not x_t,
                  against the guided mean (DMD, Eq. 8 and released code).
        "sigma2"  sigma^2 (eps_real - eps_fake) = alpha sigma (fake - real): VSD's weight
                  (Wang et al. 2023, arXiv:2305.16213, Eq. 9; SwiftBrush, arXiv:2312.05239).
        "uniform" the bare difference.
    Args:    x0, real, fake: (B, C, *S). coeffs: (alpha, sigma), each (B,), needed by "sigma2".
    Returns: (B, C, *S) float32 without graph; exactly zero where fake == real.
    """
    x0, real, fake = (full(x).detach() for x in (x0, real, fake))
    grad = fake - real
    if weight == "uniform":
        return grad
    if weight == "dmd_l1":
        norm = (x0 - real).abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True)
        return grad / norm.clamp_min(1e-6)
    if weight == "sigma2":
        if coeffs is None:
            raise ValueError("dmd_gradient: expected coeffs with weight 'sigma2', got None.")
        return expand(coeffs[0] * coeffs[1], grad) * grad
    raise ValueError(f"dmd_gradient: expected dmd_l1, sigma2 or uniform, got {weight!r}.")


def surrogate(x: Tensor, grad: Tensor) -> Tensor:
    """0.5 mean((x - stopgrad(x - grad))^2): its gradient in x is exactly grad / numel.

    The value is half the mean square of `grad`: a gradient size, not a measure of convergence.
    """
    x = full(x)
    # (x - sg(x)) + g is the same difference, but free of the rounding of x - (x - g).
    return 0.5 * ((x - x.detach()) + full(grad).detach()).square().mean()


def score_identity(x0: Tensor, real: Tensor, fake: Tensor, alpha: float = 1.0) -> Tensor:
    """SiD's loss of each sample (Zhou et al. 2024, arXiv:2404.04057, and its released code).

        mean (real - fake) ((real - x0) - alpha (real - fake)) / max(1e-5, mean |x0 - real|)

    The denominator has no gradient, all else has: real and fake must come with their graph to x0,
    or the gradient is dmd_gradient's for any alpha. With an exact fake the mean is (1 - alpha)
    E|real - fake|^2 over the denominator: zero is no sign of convergence at alpha 1.
    Args:    x0, real, fake: (B, C, *S).
    Returns: (B,) float32 (float64 of float64); exactly zero where fake == real.
    """
    x0, real, fake = (full(x) for x in (x0, real, fake))
    dims, gap = tuple(range(1, x0.ndim)), real - fake
    norm = (x0 - real).detach().abs().mean(dim=dims).clamp_min(1e-5)
    return (gap * ((real - x0) - alpha * gap)).mean(dim=dims) / norm


def denoising_target(pred: Prediction, x0: Tensor, eps: Tensor, space: PredictionType) -> Tensor:
    """What a perfect denoiser of the pair (x0, eps) predicts in `space`, (B, C, *S).

    Taken from the pair, not converted from x_t: defined at sigma = 0 too.
    """
    x0, eps = full(x0), full(eps)
    if space == "x0":
        return x0
    if space == "eps":
        return eps
    if space == "flow":
        return eps - x0
    alpha, sigma = (expand(c, x0) for c in pred.path.coeffs(pred.t))
    return alpha * eps - sigma * x0


def denoising_loss(
    pred: Prediction,
    x0: Tensor,
    eps: Tensor,
    space: DenoisingSpace = "native",
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared denoising error of `pred` at x_t = alpha x0 + sigma eps, a float32 scalar.

    Args:
        x0, eps: (B, C, *S) the pair that made pred.x_t.
        space: where the error is measured; "native" is the network's own prediction type.
        weight: (B,) factor per sample, such as alpha^2 for SwiftBrush's LoRA loss.
    """
    kind: PredictionType = pred.kind if space == "native" else space
    error = (pred.as_type(kind) - denoising_target(pred, x0, eps, kind)).square()
    return (error if weight is None else expand(weight, error) * error).mean()


def denoising_weight(
    kind: DenoisingWeight, coeffs: tuple[Tensor, Tensor], sigma_data: float = 0.5
) -> Tensor | None:
    """(B,) weight of a denoising error over noise levels, None for 1.

    kind:
        "alpha2" alpha^2 (SwiftBrush, arXiv:2312.05239, code).
        "edm"    alpha^2 / sigma^2 + 1 / sigma_data^2, of errors in x0: EDM's
                 (Karras et al. 2022, arXiv:2206.00364, Table 1; there alpha = 1), with which an
                 EDM network errs alike at every noise level.
    Args: coeffs: (alpha, sigma), each (B,). sigma_data: standard deviation of the data.
    """
    if kind == "none":
        return None
    alpha, sigma = coeffs
    return alpha**2 if kind == "alpha2" else (alpha / sigma) ** 2 + 1.0 / sigma_data**2


# ------------------------------------------------------------------ gradients of a renderer
LATE = 0.2  # NFSD: above this time the null prediction holds more than the noise


def gradient_times(
    path: NoisePath, share: Tensor, config: ScoreGradientConfig, step: int, max_steps: int
) -> Tensor:
    """(B,) times of x_t at a step of max_steps. Args: share: (B,) uniform draws in [0, 1)."""
    low, high = annealed(config.min_t, step), annealed(config.max_t, step)
    if config.times == "sqrt_anneal":
        share = torch.full_like(share, 1.0 - (step / max_steps) ** 0.5)
    return path.snap(low + (high - low) * share)


Coefficients = dict[str, float | Tensor]


@dataclass(frozen=True)
class GradientRow:
    """A kind's row: its guidance and weight, and coefficients of (options, g, t (B,), step)."""

    guidance: float
    weight: GradientWeight
    coefficients: Callable[[ScoreGradientConfig, float, Tensor, int], Coefficients]


def _csd(config: ScoreGradientConfig, _g: float, _t: Tensor, step: int) -> Coefficients:
    k2 = annealed(config.negative_weight, step)
    return {"cond": 1.0, "null": k2 - 1.0, "negative": -k2}


def _nfsd(_config: ScoreGradientConfig, g: float, t: Tensor, _step: int) -> Coefficients:
    return {"empty": 1.0, "negative": -g - (t > LATE).double(), "cond": g}


def _dreammat(config: ScoreGradientConfig, _g: float, _t: Tensor, step: int) -> Coefficients:
    names = ("cond", "null", "empty", "noise")
    values = (annealed(value, step) for value in config.coefficients)
    return dict(zip(names, values, strict=True))


# Sources: sds Poole et al. 2022, arXiv:2209.14988; vsd Wang et al. 2023, arXiv:2305.16213; csd Yu
# et al. 2023, arXiv:2310.19415; csm TV-3DG, arXiv:2410.21299, whose weight and steps are not
# published; nfsd Katzir et al. 2023, arXiv:2310.17590, in MVControl's form (the paper guides away
# from the empty prompt: give that as the negative one); bsd Huang et al. 2024, arXiv:2407.13976,
# whose two directions `score_grad` mixes; recon Shi et al. 2023 (MVDream), arXiv:2308.16512;
# dreammat Zhang et al. 2024, arXiv:2405.17176.
COEFFICIENTS: Mapping[GradientKind, GradientRow] = {
    "sds": GradientRow(
        100.0, "sigma2", lambda c, g, t, step: {"cond": g, "null": 1 - g, "noise": -1.0}
    ),
    "vsd": GradientRow(
        7.5, "sigma2", lambda c, g, t, step: {"cond": g, "null": 1 - g, "fake": -1.0}
    ),
    "csd": GradientRow(1.0, "sigma2", _csd),
    "csm": GradientRow(1.0, "sigma2", lambda c, g, t, step: {"cond": 1.0, "null": -1.0}),
    "nfsd": GradientRow(7.5, "sigma2", _nfsd),
    "bsd": GradientRow(15.0, "alpha", lambda c, g, t, step: {"cond": g, "null": -g}),
    "recon": GradientRow(
        50.0, "ism", lambda c, g, t, step: {"cond": g, "null": 1 - g, "noise": -1.0}
    ),
    "dreammat": GradientRow(1.0, "sigma2", _dreammat),
}
_GUIDED = ("sds", "vsd", "recon")  # one guided prediction: networks told the guidance have it too


def gradient_weight(kind: GradientWeight, alpha: Tensor, sigma: Tensor) -> Tensor:
    """(B,) weight over noise levels of a difference of noise predictions."""
    if kind == "ism":
        return sigma / alpha
    weights = {"sigma2": sigma**2, "fantasia3d": alpha * sigma**2, "alpha": alpha}
    return weights.get(kind, torch.ones_like(alpha))


@torch.no_grad()
def score_grad(
    net: Denoiser,
    latents: Tensor,
    t: Tensor,
    noise: Tensor,
    cond: Cond,
    null: Cond,
    config: ScoreGradientConfig,
    *,
    fake: Denoiser | None = None,
    fake_cond: Cond | None = None,
    negative: Cond | None = None,
    empty: Cond | None = None,
    step: int = 0,
) -> Tensor:
    """The gradient wanted on latents at x_t = alpha latents + sigma noise, without graph.

    Args:
        net: the teacher. latents, noise: (B, C, *S). t: (B,). null: what guidance leads away from.
        fake, fake_cond: what is fitted to the samples (vsd), and its condition where not `cond`.
        negative, empty: the negative prompt (nfsd, csd) and the empty one, `null` where not given.
        step: where annealed numbers stand.
    Returns: (B, C, *S) float32 (float64 of float64); `summed_surrogate` carries it.
    Errors: ValueError where the kind needs a fake or a negative prompt and has none, or compares
        with a null condition that the network lacks.
    """
    kind, row = config.kind, COEFFICIENTS[config.kind]
    x0, eps, path = full(latents).detach(), full(noise), net.path
    g = row.guidance if config.guidance is None else config.guidance
    wanted = row.coefficients(config, g, t, step)
    if kind == "csd" and negative is None:
        wanted = {"cond": 1.0, "null": -1.0}
    guidance = None
    if net.embeds_guidance and kind in _GUIDED:
        wanted, guidance = {**wanted, "cond": 1.0, "null": 0.0}, g
    conds = {"cond": cond, "null": null, "empty": null if empty is None else empty}
    if negative is not None:
        conds["negative"] = negative
    wanted = {
        name: c
        for name, c in wanted.items()
        if isinstance(c, Tensor) or c != 0.0 or name == "cond" or kind == "bsd"
    }
    _check_terms(net, kind, wanted, conds, fake)

    x_t = path.add_noise(x0, eps, t)
    if kind == "csm":
        x_t = ddim_inverted(net, x0, t, null, config.inversion_steps)
    terms = _predictions(net, x_t, t, {n: conds[n] for n in wanted if n in conds}, guidance)
    terms["noise"] = eps
    if "fake" in wanted:
        assert fake is not None
        terms["fake"] = fake(x_t, t, cond if fake_cond is None else fake_cond).eps
    grad = torch.zeros_like(x0)
    for name, c in wanted.items():
        grad = grad + (expand(c, x0) if isinstance(c, Tensor) else c) * terms[name].to(x0.dtype)
    if kind == "bsd":
        grad = balanced(grad, terms["null"].to(x0.dtype))

    alpha, sigma = path.coeffs(t)
    weight = "ism" if kind == "recon" else config.weight or row.weight
    grad = expand(gradient_weight(weight, alpha, sigma), x0) * grad
    if kind == "recon" and config.rescale:
        dims = tuple(range(1, x0.ndim))
        guided, plain = x0 - grad, path.to_x0(terms["cond"], x_t, t, "eps")
        ratio = plain.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp_min(1e-12)
        grad = grad + config.rescale * (1.0 - ratio) * guided
    grad = grad.nan_to_num()
    return grad if config.max_gradient is None else grad.clamp(-(b := config.max_gradient), b)


def _check_terms(
    net: Denoiser,
    kind: str,
    wanted: Coefficients,
    conds: Mapping[str, Cond],
    fake: Denoiser | None,
) -> None:
    if "fake" in wanted and fake is None:
        raise ValueError(f"{kind}: expected a fake fitted to the samples, got None.")
    if "negative" in wanted and "negative" not in conds:
        raise ValueError(f"{kind}: expected a negative prompt, got none. Give one.")
    if "null" in wanted and (not net.has_null or net.embeds_guidance):
        have = "is told the guidance" if net.embeds_guidance else "has no null condition"
        raise ValueError(
            f"{kind}: expected a network with a null condition, got one that {have}. Use "
            f"{'sds, vsd or recon' if net.embeds_guidance else 'sds or vsd at guidance 1'}."
        )


def _predictions(
    net: Denoiser, x_t: Tensor, t: Tensor, conds: Mapping[str, Cond], guidance: float | None
) -> dict[str, Tensor]:
    """Noise predictions under each condition, in one batch; a condition given twice runs once."""
    distinct = {id(one): one for one in conds.values()}
    count = len(distinct)
    many = x_t.repeat(count, *[1] * (x_t.ndim - 1)), t.repeat(count)
    made = net(*many, Cond.cat([*distinct.values()]), guidance=guidance).eps.chunk(count)
    by_id = dict(zip(distinct, made, strict=True))
    return {name: by_id[id(one)] for name, one in conds.items()}


def balanced(towards: Tensor, smooth: Tensor) -> Tensor:
    """The min-norm point al d_c + (1 - al) d_s of each sample's two directions (B, C, *S).

    al = <d_s - d_c, d_s> / |d_s - d_c|^2 within [0, 1]: no direction is descended at the other's
    cost. Source: Huang et al. 2024 (PlacidDreamer), arXiv:2407.13976; MGDA, Desideri 2012. Differs
    from the code: equal directions give that one, not zero.
    """
    dims, gap = tuple(range(1, smooth.ndim)), smooth - towards
    square = gap.square().sum(dims, keepdim=True)
    share = (gap * smooth).sum(dims, keepdim=True) / square.clamp_min(torch.finfo(gap.dtype).tiny)
    return smooth - share.clamp(0.0, 1.0) * gap


@torch.no_grad()
def ddim_inverted(net: Denoiser, x0: Tensor, t: Tensor, cond: Cond, num_steps: int) -> Tensor:
    """x_t (B, C, *S) of x0 (B, C, *S) after num_steps equal DDIM steps upwards to t (B,).

    The first one takes the prediction at its end, as no network was trained at t = 0.
    Source: Song et al. 2021, arXiv:2010.02502, Sec. 4.3.
    """
    path, x = net.path, full(x0)
    now = torch.zeros_like(t)
    for i in range(num_steps):
        later = t.double() if i + 1 == num_steps else path.snap(t * (i + 1) / num_steps)
        if i == 0:
            clean = path.add_noise(x, torch.zeros_like(x), later)
            x = path.add_noise(x, net(clean, later, cond).eps, later)
        else:
            x = net(x, now, cond).step(later)
        now = later
    return x


def summed_surrogate(latents: Tensor, grad: Tensor) -> Tensor:
    """`surrogate` summed over a sample's elements, and its mean over samples: its gradient in
    latents (B, C, *S) is grad / B, as threestudio and its learning rates have it."""
    return surrogate(latents, grad) * (latents.numel() / latents.shape[0])
