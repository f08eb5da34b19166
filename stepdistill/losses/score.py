"""Distribution matching: the difference of two denoised means, as a gradient on the sample.

For a generated x0 noised to x_t, `real` and `fake` are the x0 predictions of the teacher and of a
denoiser fitted to the generator. `fake - real` is proportional to the gradient in x0 of
KL(generator || data) at that noise level (Yin et al. 2023, arXiv:2311.18828, Eq. 7). Sign check:
score = -(x_t - alpha x0) / sigma^2, so score_fake - score_real = (alpha / sigma^2) (fake - real).

Differs from the paper: the released code, followed here, has no factor alpha in front of the
normalised difference (the same thing where alpha = 1); the normaliser is clamped at 1e-6.
"""

# Shapes: B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from typing import Literal

from torch import Tensor

from stepdistill.core.denoiser import Prediction
from stepdistill.core.path import PredictionType, expand, full

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
