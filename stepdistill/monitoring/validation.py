"""Validation: the same prompts from the same noise at every step, so change is training.

A grid to look at, and cheap metrics: the samples against the teacher's of the same noise, the
student's error along the teacher's trajectory, and how far a fake score lags.
"""

# Shapes: N samples (prompt by prompt), B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.pil_utils import make_image_grid
from PIL import Image
from torch import Tensor

from stepdistill.config.run import TrainConfig
from stepdistill.core.denoiser import Denoiser, is_guided
from stepdistill.core.method import FakeFit, Method
from stepdistill.core.solvers import SamplerSpec, one_call_x0
from stepdistill.core.times import shift_times
from stepdistill.families.audio import AudioFamily
from stepdistill.families.family import Family
from stepdistill.monitoring.fake_lag import LAG_TIMES, lag_of, lag_terms
from stepdistill.monitoring.reference import (
    BATCH,
    Reference,
    conditions,
    probe_times,
    rms,
    saved_reference,
    teacher_guidance,
)
from stepdistill.monitoring.sample_metrics import (
    Features,
    guidance_metrics,
    pooled_features,
    sample_metrics,
)
from stepdistill.reporting.bars import bar
from stepdistill.reporting.sound import write_wav
from stepdistill.roles.rolebank import RoleBank
from stepdistill.sampling import keyed_noise, sample_images, sample_latents, to_pil


def validate(
    student: Denoiser, family: Family, spec: SamplerSpec, args: TrainConfig, path: Path
) -> Image.Image:
    """The grid (a row per prompt), also saved to `path`."""
    size = (args.resolution, args.resolution)
    prompts = grid_prompts(args, family)
    if isinstance(family, AudioFamily):
        latents = sample_latents(student, family, spec, prompts, args.seed)
        waves = family.images(latents).detach()
        save_sounds(family, waves, path)
        return save_grid(to_pil(family.pictures(waves)), args.num_validation_images, path)
    images = sample_images(student, family, spec, prompts, args.seed, *size)
    return save_grid(images, args.num_validation_images, path)


def save_sounds(family: Family, waves: Tensor, grid: Path) -> None:
    """Of a family of sound, the waves (N, channels, samples) beside their grid: GRID-0.wav, ..."""
    if isinstance(family, AudioFamily):
        grid.parent.mkdir(parents=True, exist_ok=True)
        for i, wave in enumerate(waves):
            write_wav(grid.with_name(f"{grid.stem}-{i}.wav"), wave, family.sample_rate)


def grid_prompts(args: TrainConfig, family: Family) -> list[Any]:
    """Each validation prompt as often as it has images; numbers are class ids where labels tell."""
    by_label = family.conditioning == "label"
    prompts = [int(p) if by_label and p.isdigit() else p for p in args.validation_prompts]
    return [p for p in prompts for _ in range(args.num_validation_images)]


def save_grid(images: Sequence[Image.Image], columns: int, path: Path) -> Image.Image:
    """The images in rows of `columns`, also saved to `path`."""
    grid = make_image_grid([im.convert("RGB") for im in images], len(images) // columns, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)
    return grid


@dataclass(frozen=True)
class Validation:
    """metrics: see sample_metrics.METRICS. trajectory: RMS errors by probed time t, descending."""

    grid: Image.Image
    metrics: dict[str, float]
    trajectory: dict[str, list[float]] = field(default_factory=dict)


class Validator:
    """Validates one run; the teacher's samples are made once, when first needed.

    features: what the Frechet distance is taken in; replace it by a network of yours.
    batch: samples of a call.
    guidance: of the teacher that the student is compared with. args: the run's options, with those
    of validation that it decided on.
    """

    def __init__(self, bank: RoleBank, method: Method[Any], args: TrainConfig) -> None:
        self.features: Features = pooled_features
        self.batch = BATCH
        self._bank, self._method, self.args = bank, method, args
        self._folder = Path(args.output_dir) / "validation"
        self.guidance = teacher_guidance(method, args)
        self._guided: dict[str, float] = {}  # what guidance does to the teacher's samples

    @property
    def _teacher(self) -> Denoiser:
        return self._bank["teacher"].skipping(self._method.skip_layers)

    @property
    def _device(self) -> torch.device:
        return next(self._bank.family.net.parameters()).device

    @cached_property
    def _reference(self) -> tuple[Reference, Tensor] | None:
        """The teacher's samples and their images (N, 3, H, W), or videos."""
        if not self.args.validation_teacher_steps:
            return None
        reference = saved_reference(
            self._folder,
            self._teacher,
            self._bank.family,
            grid_prompts(self.args, self._bank.family),
            self.args,
            self.guidance,
            probe_times(self._method.sampler()) if self._same_path else (),
            self.batch,
        )
        grid = self._folder / "teacher.png"
        images = self._seen(reference.x0, grid)
        save_grid(to_pil(images), self.args.num_validation_images, grid)
        if reference.unguided is not None:
            made = self._bank.family.pictures(self._images(reference.unguided))
            plain = (reference.unguided, made)
            self._guided = guidance_metrics((reference.x0, images), plain)
        return reference, images

    @property
    def _same_path(self) -> bool:
        """Whether the student moves on the teacher's path (a raw reflow student does not)."""
        return self._bank["student"].path is self._bank["teacher"].path

    def _images(self, latents: Tensor) -> Tensor:
        parts = latents.split(self.batch)
        with torch.no_grad():
            made = [self._bank.family.images(p.to(self._device)).float().cpu() for p in parts]
        return torch.cat(made)

    def _seen(self, latents: Tensor, grid: Path) -> Tensor:
        """Their images; of sound the spectrograms, and the waves beside the grid."""
        images, family = self._images(latents), self._bank.family
        save_sounds(family, images, grid)
        return family.pictures(images)

    def _latents(self, student: Denoiser, spec: SamplerSpec) -> Tensor:
        """x0 (N, C, *S) of the grid's noise, on the CPU."""
        args, prompts = self.args, grid_prompts(self.args, self._bank.family)
        size = (args.resolution, args.resolution)
        off = args.disable_progress_bar
        parts = [
            sample_latents(
                student, self._bank.family, spec, prompts[i : i + self.batch], args.seed, *size, i
            )
            for i in bar(
                range(0, len(prompts), self.batch), desc="validation", leave=False, disable=off
            )
        ]
        return torch.cat([p.float().cpu() for p in parts])

    def run(self, student: Denoiser, spec: SamplerSpec, step: int) -> Validation:
        """Sample, measure and save the grid of `step`."""
        args, reference = self.args, self._reference
        latents = self._latents(student, spec)
        path, columns = self._folder / f"step-{step}.png", args.num_validation_images
        images = self._seen(latents, path)
        grid = save_grid(to_pil(images), columns, path)
        against = None if reference is None else (reference[0].x0, reference[1])
        metrics = sample_metrics(latents, images, against, columns, self.features)
        metrics |= self._guided
        trajectory: dict[str, list[float]] = {}
        if reference is not None and reference[0].states:
            trajectory = self._trajectory(student, spec, reference[0])
            spread = max(float(reference[0].x0.std()), 1e-6)
            errors = trajectory["student"]
            metrics["trajectory_rmse"] = sum(errors) / len(errors) / spread
        if (fit := self._method.fake_fit) is not None:
            metrics["fake_lag"], metrics["fake_lag_error"] = self._fake_lag(spec, fit)
        return Validation(grid, metrics, trajectory)

    @torch.no_grad()
    def _trajectory(
        self, student: Denoiser, spec: SamplerSpec, teacher: Reference
    ) -> dict[str, list[float]]:
        """RMS distance of x0 predictions on the teacher's trajectory from its end, by time."""
        prompts, errors = grid_prompts(self.args, self._bank.family), []
        for t, states in teacher.states.items():
            parts = []
            for i in range(0, len(prompts), self.batch):
                x = states[i : i + self.batch].to(self._device)
                cond, null = conditions(
                    self._bank.family,
                    student,
                    prompts[i : i + self.batch],
                    spec.guidance,
                    self._device,
                    x.shape[1:],
                )
                at = torch.full((len(x),), t, dtype=torch.float64, device=x.device)
                parts.append(one_call_x0(student, spec, x, at, cond, null).float().cpu())
            errors.append(rms(torch.cat(parts) - teacher.x0))
        times = list(teacher.states)
        return {"t": times, "student": errors, "teacher": [teacher.errors[t] for t in times]}

    def _fake_lag(self, spec: SamplerSpec, fit: FakeFit) -> tuple[float, float]:
        """(lag, standard error) on samples that stop at each of the sampler's steps in turn.

        The fake is fitted to what the student makes at every step of a rollout, unless the method
        trains the last one alone.
        """
        bank, args, prompts = self._bank, self.args, grid_prompts(self.args, self._bank.family)
        size = (args.resolution, args.resolution)
        shape = bank.family.sample_shape(*size)
        shift = bank.family.shift_at(*size)
        times = shift_times(torch.tensor(LAG_TIMES), shift).tolist()
        stops = range(spec.num_steps if fit.last_step else 1, spec.num_steps + 1)
        guided = max(fit.teacher, fit.fake, fit.fitted, key=is_guided)
        teacher, fake = self._teacher, bank["fake"].skipping(self._method.skip_layers)
        terms = []
        for stop, rows in zip(
            stops, torch.arange(len(prompts)).tensor_split(len(stops)), strict=True
        ):
            ending = replace(spec, times=spec.times[:stop])
            for part in rows.split(self.batch) if len(rows) else ():
                index = part.tolist()
                chosen = [prompts[i] for i in index]
                x0 = sample_latents(
                    bank["student"], bank.family, ending, chosen, args.seed, *size, index[0]
                )
                cond, null = conditions(bank.family, teacher, chosen, guided, self._device, shape)

                def noise(k: int, index: list[int] = index, like: Tensor = x0) -> Tensor:
                    return keyed_noise(shape, args.seed, index, 1000 + k).to(like)

                terms.append(lag_terms(teacher, fake, x0, cond, null, fit, times, noise))
        return lag_of(torch.cat(terms))
