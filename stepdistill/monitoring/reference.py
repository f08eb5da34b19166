"""The teacher's samples that validation compares with: solved once a run from the grid's own noise.

Kept as validation/teacher.safetensors, so that a resumed run need not solve them again.
"""

# Shapes: N samples, B batch, C channels, *S spatial or (F, H, W).

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.config.run import TrainConfig
from stepdistill.core.denoiser import Denoiser, is_guided
from stepdistill.core.method import Method
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.families.family import Family
from stepdistill.reporting.bars import bar
from stepdistill.sampling import keyed_noise
from stepdistill.storage.files import write_atomic

MAX_PROBES = 8
BATCH = 8


@dataclass(frozen=True)
class Reference:
    """The teacher's x0 (N, C, *S) on the CPU, and its trajectory at the probed times.

    states: probed time -> x_t (N, C, *S). errors: probed time -> RMS distance of the teacher's own
    x0 prediction there from its last one, which a student that jumps to the end undercuts.
    unguided: the same without guidance, where there is some.
    """

    x0: Tensor
    states: dict[float, Tensor]
    errors: dict[float, float]
    unguided: Tensor | None = None


def teacher_guidance(method: Method[Any], args: TrainConfig) -> float:
    """Guidance of the teacher that the student is held against: the method's, unless args say."""
    given = args.validation_guidance
    return method.teacher_guidance if given is None else given


def probe_times(spec: SamplerSpec) -> tuple[float, ...]:
    """At most MAX_PROBES descending times that the student is trained at, its sampler's first."""
    times = spec.times if spec.num_steps > 1 or spec.trained_times is None else spec.trained_times
    times = tuple(sorted(times, reverse=True))
    if spec.trained_times is None and spec.num_steps == 1:
        times = uniform_grid(MAX_PROBES)
    keep = max(1, -(-len(times) // MAX_PROBES))
    return times[::keep]


def conditions(
    family: Family,
    denoiser: Denoiser,
    prompts: Sequence[Any],
    guidance: float,
    device: Any,
    shape: Sequence[int],
) -> tuple[Cond, Cond | None]:
    """(cond, null where a call with that guidance needs one) of the prompts, for latents of that
    shape (C, *S)."""
    cond = family.encode_at(prompts, shape).to(device)
    needs = denoiser.has_null and not denoiser.embeds_guidance and is_guided(guidance)
    return cond, family.null_for(cond) if needs else None


@torch.no_grad()
def solve_reference(
    teacher: Denoiser,
    family: Family,
    prompts: Sequence[Any],
    args: TrainConfig,
    guidance: float,
    probes: Sequence[float],
    batch: int = BATCH,
) -> Reference:
    """Solve the teacher's guided ODE from the validation noise of these prompts."""
    size = (args.resolution, args.resolution)
    device = next(family.net.parameters()).device
    shape = family.sample_shape(*size)
    grid = uniform_grid(args.validation_teacher_steps, family.shift_at(*size))
    times = sorted({*grid, *probes}, reverse=True)
    ends, parts, states = [*times[1:], 0.0], [], {t: [] for t in probes}  # type: ignore[var-annotated]
    predicted: dict[float, list[Tensor]] = {t: [] for t in probes}
    batches, off = range(0, len(prompts), batch), args.disable_progress_bar
    for first in bar(batches, desc="validation: teacher", leave=False, disable=off):
        part = prompts[first : first + batch]
        cond, null = conditions(family, teacher, part, guidance, device, shape)
        noise = keyed_noise(shape, args.seed, range(first, first + len(part))).to(device)
        x = teacher.path.prior(noise)
        for t, s in zip(times, ends, strict=True):
            at = torch.full((len(part),), t, dtype=torch.float64, device=device)
            pred = teacher(x, at, cond, null, guidance)
            if t in states:
                states[t].append(x.cpu())
                predicted[t].append(pred.x0.float().cpu())
            x = pred.x0 if s == 0.0 else pred.step(torch.full_like(at, s))
        parts.append(x.float().cpu())
    x0 = torch.cat(parts)
    errors = {t: rms(torch.cat(p) - x0) for t, p in predicted.items()}
    return Reference(x0, {t: torch.cat(s) for t, s in states.items()}, errors)


def rms(x: Tensor) -> float:
    """Root mean square of all values."""
    return float(x.float().square().mean().sqrt())


def saved_reference(
    folder: Path,
    teacher: Denoiser,
    family: Family,
    prompts: Sequence[Any],
    args: TrainConfig,
    guidance: float,
    probes: Sequence[float],
    batch: int = BATCH,
) -> Reference:
    """`solve_reference`, or what an earlier part of the run kept of it in `folder`."""
    path = folder / "teacher.safetensors"
    facts = [list(map(str, prompts)), args.seed, args.resolution, args.validation_teacher_steps]
    facts += [guidance, list(probes), family.sample_shape(args.resolution, args.resolution)]
    facts += [list(teacher.null_skips)] if teacher.null_skips else []
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if path.is_file():
        with safe_open(path, framework="pt") as saved:
            metadata = saved.metadata() or {}
            if metadata.get("key") == key:
                errors = {float(t): e for t, e in json.loads(metadata["errors"])}
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
                states = {t: tensors[f"x_t/{i}"] for i, t in enumerate(errors)}
                return Reference(tensors["x0"], states, errors, tensors.get("unguided"))
    reference = solve_reference(teacher, family, prompts, args, guidance, probes, batch)
    tensors = {f"x_t/{i}": x.contiguous() for i, x in enumerate(reference.states.values())}
    tensors["x0"] = reference.x0.contiguous()
    if guidance != 1.0 and teacher.has_null and not teacher.embeds_guidance:
        plain = solve_reference(teacher, family, prompts, args, 1.0, (), batch)
        reference = replace(reference, unguided=plain.x0)
        tensors["unguided"] = plain.x0.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"key": key, "errors": json.dumps(list(reference.errors.items()))}
    write_atomic(path, lambda aside: save_file(tensors, aside, metadata))
    return reference
