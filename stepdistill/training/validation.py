"""Validation grids: the same prompts from the same seeds at every step, so change is training."""

from __future__ import annotations

from pathlib import Path

from diffusers.utils.pil_utils import make_image_grid
from PIL import Image

from stepdistill.core.denoiser import Denoiser
from stepdistill.core.solvers import SamplerSpec
from stepdistill.models.family import Family
from stepdistill.sampling import sample_images
from stepdistill.training.config import TrainConfig


def validate(
    student: Denoiser, family: Family, spec: SamplerSpec, args: TrainConfig, path: Path
) -> Image.Image:
    """The grid (a row per prompt), also saved to `path`."""
    columns = args.num_validation_images
    prompts = [p for p in args.validation_prompts for _ in range(columns)]
    images = sample_images(
        student,
        family,
        spec,
        prompts,
        seed=args.seed,
        height=args.resolution,
        width=args.resolution,
    )
    grid = make_image_grid([im.convert("RGB") for im in images], len(images) // columns, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return grid
