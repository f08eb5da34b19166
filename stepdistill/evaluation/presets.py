"""Protocols of the field as named defaults; flags override each of them.

Papers differ in details that move a Frechet distance by whole units and rarely state them all, so
numbers of a preset compare with each other, and with a paper only where its own protocol was the
same. Prompts, images and weights are your local files: nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """about: what it is and where from. options: defaults of `Options`. files: what you bring;
    features: its network; real: whether it measures against real images alone."""

    about: str
    options: Mapping[str, Any]
    files: str
    features: str = "inception"
    real: bool = True


PRESETS: dict[str, Preset] = {
    # Filter and Inception input follow GigaGAN's evaluation (arXiv:2303.05511, Appendix), which DMD
    # and DMD2 name as theirs; the choice of captions is unverified.
    "coco30k": Preset(
        "zero-shot COCO 2014: 30,000 captions, one image each, 256 px (DMD, DMD2, SwiftBrush)",
        {"num_prompts": 30_000, "size_px": 256, "resize_filter": "lanczos", "num_reference": None},
        "--prompts_file: 30k captions of val2014, one a line; --reference: val2014 images; "
        "--features inception:FILE",
    ),
    # InstaFlow (arXiv:2309.06380, Table 1) and its followers; the filter is unverified.
    "coco5k": Preset(
        "COCO 2017 validation: 5,000 captions, one image each, 512 px (InstaFlow, PeRFlow)",
        {"num_prompts": 5_000, "size_px": 512, "resize_filter": "bicubic", "num_reference": 5_000},
        "--prompts_file: 5k captions of val2017, one a line; --reference: val2017 images; "
        "--features inception:FILE",
    ),
    # SDXL-Lightning (arXiv:2402.13929, Sec. 4): full-size detail that a resize would hide.
    "patch_fid": Preset(
        "patch FID: the middle 299 px of full-size images, without resizing (SDXL-Lightning)",
        {"num_prompts": 10_000, "crop_px": 299, "size_px": None, "num_reference": None},
        "--prompts_file: 10k captions, one a line; --reference: images of 299 px or more, or none "
        "(then the teacher's own); --features inception:FILE",
        real=False,
    ),
}


def preset(name: str) -> Preset:
    """Errors: ValueError naming the choices."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {name!r}.")
    return PRESETS[name]
