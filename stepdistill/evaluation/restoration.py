"""How near images are to those that they restore: PSNR, SSIM, and what a judge of pairs says.

Super-resolution has one right answer, or nearly: images are compared one by one, not as sets. PSNR
and SSIM reward the blurred mean of all that fits; a judge (LPIPS, or the distance in a network that
`stepdistill features train` made) tells that apart.
Sources: Wang et al. 2004 (SSIM, 11 px Gaussian of 1.5); torchmetrics computes both.
"""

# Shapes: B batch, H, W in px.

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from stepdistill.core.method import Scorer

_LUMA = (65.481, 128.553, 24.966)  # ITU-R BT.601, of [0, 1] to [16, 235]
SMALLEST = 11  # px that SSIM's window needs


def restoration(
    images: Tensor,
    references: Tensor,
    crop_px: int = 4,
    luma: bool = False,
    judges: Mapping[str, Scorer] | None = None,
) -> dict[str, Tensor]:
    """{"psnr" in dB, "ssim", and each judge's distance}, (B,) float32 each; lower distances are
    nearer.

    Args: images, references: (B, 3, H, W) in [0, 1], rounded to eight bits here, as files hold
        them. crop_px: border left out of PSNR and SSIM, where enlarging knows less. luma: of the Y
        channel alone, as most tables of the field have it, else of three colours. judges: called
        with images and references in [-1, 1], uncropped.
    Errors: ValueError without torchmetrics, for other shapes, or where cropping leaves too little.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        raise ValueError(
            'restoration: expected torchmetrics, got none. pip install "stepdistill[eval]"'
        )
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    if images.shape != references.shape or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(
            "restoration: expected images and references (B, 3, H, W) of one shape, got "
            f"{tuple(images.shape)} and {tuple(references.shape)}."
        )
    if min(images.shape[-2:]) - 2 * crop_px < SMALLEST:
        raise ValueError(
            f"restoration: expected {SMALLEST} px a side or more within a border of {crop_px}, got "
            f"{tuple(images.shape[-2:])}. Lower crop_px, or compare larger images."
        )
    made, wanted = ((x.float().clamp(0, 1) * 255).round() / 255 for x in (images, references))
    measured = {
        name: judge(made * 2 - 1, wanted * 2 - 1).float() for name, judge in (judges or {}).items()
    }
    height, width = made.shape[-2:]
    inner = (..., slice(crop_px, height - crop_px), slice(crop_px, width - crop_px))
    made, wanted = made[inner], wanted[inner]
    if luma:
        made, wanted = (_luma(x) for x in (made, wanted))
    psnr = peak_signal_noise_ratio(made, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(made, wanted, data_range=1.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return {"psnr": psnr, "ssim": ssim, **measured}


def _luma(x: Tensor) -> Tensor:
    """(B, 1, H, W) of (B, 3, H, W)."""
    weights = torch.tensor(_LUMA, device=x.device).view(1, 3, 1, 1)
    return ((x * weights).sum(1, keepdim=True) + 16.0) / 255.0
