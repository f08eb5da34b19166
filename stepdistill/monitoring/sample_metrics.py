"""Cheap metrics of a validation: the student's samples against the teacher's of the same noise.

Made for the few images of a grid: no network is downloaded, and nothing is estimated that a
handful of samples can't give. `evaluation` has the metrics that are worth publishing.
"""

# Shapes: N samples (P prompts with n each, prompt by prompt), C channels, *S spatial, D features.

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Features = Callable[[Tensor], Tensor]  # images (N, 3, H, W) in [-1, 1] -> (N, D)


_CLIPPED = 1.0 - 1.0 / 255.0


def frame_of(images: Tensor) -> Tensor:
    """(N, C, H, W) of images, or the middle frames of videos (N, C, F, H, W)."""
    return images if images.ndim == 4 else images[:, :, images.shape[2] // 2]


def pooled_features(images: Tensor) -> Tensor:
    """(N, D) built-in features of images (N, C, H, W): means over 1, 2x2 and 4x4 fields, spread."""
    x = images.float().clamp(-1, 1)
    pooled = [F.adaptive_avg_pool2d(x, size).flatten(1) for size in (1, 2, 4)]
    return torch.cat([*pooled, x.flatten(2).std(2)], dim=1)


def frechet_diagonal(x: Tensor, y: Tensor) -> float:
    """Frechet distance of the Gaussians with diagonal covariance fitted to x (N, D) and y (M, D).

    sum over features of (mean_x - mean_y)^2 + (std_x - std_y)^2: the part of arXiv:1706.08500,
    Eq. 6, that few samples can give. Not comparable with a published FID.
    """
    x, y = x.double(), y.double()
    means = (x.mean(0) - y.mean(0)).square().sum()
    spreads = (x.std(0, unbiased=False) - y.std(0, unbiased=False)).square().sum()
    return float(means + spreads)


def saturation(images: Tensor) -> float:
    """Share of values of images (N, C, *S) at or beyond -1 and 1."""
    return float((images.abs() >= _CLIPPED).float().mean())


def diversity(latents: Tensor, per_prompt: int) -> float:
    """Root-mean-square distance, per value, between two samples (N, C, *S) of the same prompt.

    0 where a prompt has one sample.
    """
    if per_prompt < 2:
        return 0.0
    rows = latents.float().flatten(1).unflatten(0, (-1, per_prompt))  # (P, n, C*S)
    return float((2.0 * rows.var(1, unbiased=True).mean()).sqrt())  # E|a - b|^2 = 2 var


def movement(videos: Tensor) -> float:
    """Mean |frame_i - frame_0| of videos (N, C, F, H, W) in [-1, 1] over their later frames; 0 is a
    still clip, which students from a first frame tend to become."""
    shown = videos.float().clamp(-1, 1)
    return float((shown[:, :, 1:] - shown[:, :, :1]).abs().mean())


def x0_drift(student: Tensor, teacher: Tensor) -> tuple[float, float]:
    """(shift of the channel means in the teacher's std, ratio of the stds) of x0 (N, C, *S).

    Root mean square over channels; both over all samples at once.
    """
    dims = (0, *range(2, student.ndim))
    s, t = student.float(), teacher.float()
    t_std = t.std(dims).clamp_min(1e-6)
    shift = ((s.mean(dims) - t.mean(dims)) / t_std).square().mean().sqrt()
    ratio = (s.std(dims).square().mean() / t_std.square().mean()).sqrt()
    return float(shift), float(ratio)


def guidance_metrics(
    guided: tuple[Tensor, Tensor], unguided: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Drift of the teacher's guided samples (x0, images) from its unguided ones."""
    shift, ratio = x0_drift(guided[0], unguided[0])
    excess = saturation(guided[1]) - saturation(unguided[1])
    return {
        "guided_mean_drift": shift,
        "guided_std_ratio": ratio,
        "guided_saturation_excess": excess,
    }


def sample_metrics(
    latents: Tensor,
    images: Tensor,
    reference: tuple[Tensor, Tensor] | None,
    per_prompt: int,
    features: Features = pooled_features,
) -> dict[str, float]:
    """Metrics of samples (latents, images), and against a teacher's (latents, images) if there.

    Args: latents (N, C, *S), images (N, C, H, W) or videos, all on the CPU.
    """
    metrics = {"saturation": saturation(images)}
    if per_prompt > 1:
        metrics["diversity"] = diversity(latents, per_prompt)
    moves = images.ndim == 5 and images.shape[2] > 1
    if moves:
        metrics["movement"] = movement(images)
    if reference is None:
        return metrics
    teacher, teacher_images = reference
    spread = float(teacher.float().std())
    metrics["frechet_diagonal"] = frechet_diagonal(
        features(frame_of(images)), features(frame_of(teacher_images))
    )
    error = (latents.float() - teacher.float()).square().mean().sqrt()
    metrics["teacher_rmse"] = float(error) / max(spread, 1e-6)
    metrics["x0_mean_drift"], metrics["x0_std_ratio"] = x0_drift(latents, teacher)
    metrics["saturation_excess"] = metrics["saturation"] - saturation(teacher_images)
    if moves and (usual := movement(teacher_images)) > 0.0:
        metrics["movement_ratio"] = metrics["movement"] / usual
    if per_prompt > 1:
        usual = diversity(teacher, per_prompt)
        if usual > 0.0:
            metrics["diversity_ratio"] = metrics["diversity"] / usual
    return metrics
