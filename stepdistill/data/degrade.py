"""Low-resolution images made of those of the data, for models that enlarge one.

bicubic shrinks by the factor. real_esrgan is its second-order chain: twice blur, resize, noise
(Gaussian or Poisson) and JPEG, the last resize to the factor with a sinc filter before or after the
last JPEG. Both end in eight bits, as a file would, and are brought to the size that the model reads
them in. All draws are keyed by (seed, position in the stream), which is sample and epoch, so a
resumed run repeats them; the easier image of a sample has the same draws, but for noise.
Source: Wang et al. 2021, arXiv:2107.10833, and options/train_realesrgan_x4plus.yml.
Differs from it: Gaussian kernels alone (their generalised and plateau ones left out); resizing is
antialiased; edges are repeated under a kernel, not mirrored; the target is not sharpened.
"""

# Shapes: C channels, H, W in px of an image, h, w of a smaller one. Images in [0, 1] within.

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stepdistill.core.context import stable_seed
from stepdistill.core.types import CONDITIONING, EASIER
from stepdistill.data.captions import one_caption
from stepdistill.data.degradation import Degradation

Range = tuple[float, float]


class _Pass(NamedTuple):
    """blur: its share and sigma, px. up, down: shares of resizing, within scales. noise: standard
    deviation of 255. poisson: its scale."""

    blur: float
    sigma: Range
    up: float
    down: float
    scales: Range
    noise: Range
    poisson: Range


FIRST = _Pass(1.0, (0.2, 3.0), 0.2, 0.7, (0.15, 1.5), (1.0, 30.0), (0.05, 3.0))
SECOND = _Pass(0.8, (0.2, 1.5), 0.3, 0.4, (0.3, 1.2), (1.0, 25.0), (0.05, 2.5))
SINC_SHARE, LAST_SINC_SHARE, GREY_SHARE, GAUSSIAN_SHARE = 0.1, 0.8, 0.4, 0.5
ROUND_SHARE = 0.45 / (0.45 + 0.25)  # of their round and stretched Gaussians
QUALITY = (30.0, 95.0)
_MODES = ("area", "bilinear", "bicubic")


def drawn(dataset: Any, item: dict[str, Any], seed: int, position: int) -> dict[str, Any]:
    """What a dataset's item is at a position of the stream: with one of its captions, and with the
    low-resolution images that the dataset's `degradation` says."""
    item, rule = one_caption(item, seed, position), getattr(dataset, "degradation", None)
    if rule is None or rule.factor is None or "image" not in item:
        return item
    key = stable_seed("degrade", seed, position)
    factors = {CONDITIONING: rule.factor, EASIER: rule.easier if dataset.with_easier else None}
    made = {
        name: degraded(item["image"], factor, rule, key, dataset.px_beside)
        for name, factor in factors.items()
        if factor is not None
    }
    return {**item, **made, **({} if rule.prompt is None else {"prompt": rule.prompt})}


def degraded(
    image: Tensor, factor: int, rule: Degradation, seed: int, px_beside: int = 1
) -> Tensor:
    """(3, H / px_beside, W / px_beside) in [-1, 1] of an image (3, H, W) in [-1, 1]: at 1 / factor
    of its size, then brought to that one.

    Args: px_beside: px of what the model makes that one of the image it reads stands for.
    """
    height, width = image.shape[-2:]
    small = max(1, height // factor), max(1, width // factor)
    x = image * 0.5 + 0.5
    x = _resized(x, small) if rule.kind == "bicubic" else _second_order(x, small, seed)
    x = _resized(_eight_bits(x), (height // px_beside, width // px_beside))
    return x.clamp(0.0, 1.0) * 2.0 - 1.0


def _second_order(x: Tensor, small: tuple[int, int], seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)  # of the same number whatever the factor
    noise = torch.Generator().manual_seed(stable_seed("noise", seed))

    def u() -> float:
        return float(torch.rand((), generator=draws, dtype=torch.float64))

    def between(ends: Range) -> float:
        return ends[0] + (ends[1] - ends[0]) * u()

    height, width = x.shape[-2:]
    for one, size in ((FIRST, (height, width)), (SECOND, small)):
        kernel = _kernel(u, between, one.sigma)
        x = _filtered(x, kernel) if u() < one.blur else x
        way, more, less = u(), between((1.0, one.scales[1])), between((one.scales[0], 1.0))
        scale = more if way < one.up else less if way < one.up + one.down else 1.0
        scaled = max(1, int(size[0] * scale)), max(1, int(size[1] * scale))
        x = _resized(x, scaled, _MODES[int(3 * u())])
        gaussian, grey = u() < GAUSSIAN_SHARE, u() < GREY_SHARE
        sigma, strength = between(one.noise) / 255.0, between(one.poisson)
        x = _noisy(x, sigma if gaussian else strength, gaussian, grey, noise)
        quality, mode = int(between(QUALITY)), _MODES[int(3 * u())]
        if one is FIRST:
            x = _jpeg(x, quality)
    sinc, first = _sinc(between((math.pi / 3, math.pi)), _side(u)), u() < 0.5
    last = u() < LAST_SINC_SHARE
    for resizing in (first, not first):
        if not resizing:
            x = _jpeg(x, quality)
            continue
        x = _resized(x, small, mode)
        x = _filtered(x, sinc) if last else x
    return x


def _side(u: Any) -> int:
    """Of a kernel: 7, 9, ... 21 px."""
    return 7 + 2 * int(8 * u())


def _kernel(u: Any, between: Any, sigma: Range) -> Tensor:
    """(k, k) a Gaussian, round or stretched and turned, or a sinc; sums to 1."""
    side, is_sinc, is_round = _side(u), u() < SINC_SHARE, u() < ROUND_SHARE
    first, second, angle = between(sigma), between(sigma), between((-math.pi, math.pi))
    cutoff = between((math.pi / 3 if side < 13 else math.pi / 5, math.pi))
    if is_sinc:
        return _sinc(cutoff, side)
    second = first if is_round else second
    x, y = _grid(side)
    along, across = (
        math.cos(angle) * x + math.sin(angle) * y,
        math.cos(angle) * y - math.sin(angle) * x,
    )
    kernel = torch.exp(-0.5 * ((along / first) ** 2 + (across / second) ** 2))
    return kernel / kernel.sum()


def _grid(side: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(side, dtype=torch.float32) - side // 2
    return at[None, :].expand(side, side), at[:, None].expand(side, side)


def _sinc(cutoff: float, side: int) -> Tensor:
    """(k, k) the round low-pass filter cutoff J1(cutoff r) / (2 pi r), which rings; sums to 1."""
    x, y = _grid(side)
    r = (x**2 + y**2).sqrt()
    kernel = cutoff * torch.special.bessel_j1(cutoff * r) / (2.0 * math.pi * r.clamp_min(1e-6))
    kernel[side // 2, side // 2] = cutoff**2 / (4.0 * math.pi)
    return kernel / kernel.sum()


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    pad = [kernel.shape[0] // 2] * 4
    planes = F.pad(x.unsqueeze(1), pad, mode="replicate")  # (C, 1, H, W)
    return F.conv2d(planes, kernel[None, None]).squeeze(1)


def _resized(x: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    smooth: dict[str, Any] = {} if mode == "area" else {"antialias": True, "align_corners": False}
    return F.interpolate(x.unsqueeze(0), size, mode=mode, **smooth)[0]


def _noisy(
    x: Tensor, strength: float, gaussian: bool, grey: bool, noise: torch.Generator
) -> Tensor:
    """With Gaussian noise of that deviation, or Poisson noise times it; one value for the three
    channels where grey."""
    if gaussian:
        shape = (1 if grey else len(x), *x.shape[1:])
        return (x + strength * torch.randn(shape, generator=noise)).clamp(0.0, 1.0)
    clean = _eight_bits(x)
    weights = clean.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    light = _eight_bits((weights * clean).sum(0, keepdim=True)) if grey else clean
    photons = 2.0 ** math.ceil(math.log2(max(2, len(light.unique()))))
    counted = torch.poisson(light * photons, generator=noise) / photons
    return (x + strength * (counted - light)).clamp(0.0, 1.0)


def _eight_bits(x: Tensor) -> Tensor:
    return (x.clamp(0.0, 1.0) * 255.0).round() / 255.0


def _jpeg(x: Tensor, quality: int) -> Tensor:
    pixels = (x.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "JPEG", quality=quality)
    read = torch.from_numpy(np.array(Image.open(file)))
    return read.permute(2, 0, 1).float() / 255.0
