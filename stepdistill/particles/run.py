"""One optimisation of particles by a score gradient: resumable, the same draws whenever it stops.

Source: Wang et al. 2023, arXiv:2305.16213, Sec. 3 and its 2-D experiment: N particles of a prompt,
Adam 0.03, vsd's LoRA updated beside them, times annealed. The state lies in a folder of its own,
written whole each SAVE_SECONDS and at the end.
"""

# Shapes: N particles, B rows of a step, C channels, *S spatial, H, W in px.

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.core.context import Ctx
from stepdistill.core.stopping import stop_if_orphaned
from stepdistill.families.family import Family
from stepdistill.loading.safe_files import read_tensors
from stepdistill.loading.source import ModelSource
from stepdistill.losses.score_options import ScoreGradientConfig
from stepdistill.particles.guidance import ScoreGuidance
from stepdistill.particles.options import ParticleConfig
from stepdistill.particles.side_inputs import SideInputs
from stepdistill.particles.voxels import VoxelScene, orbit
from stepdistill.storage.files import json_sha256, read_json
from stepdistill.storage.folders import fault_of, write_folder
from stepdistill.storage.optimizers import load_optimizer_tensors, optimizer_tensors

SAVE_SECONDS = 30.0
DECODED = 16  # latents at a time
CAMERAS = 4  # a step, of voxels
LOWEST, HIGHEST = -0.3, 0.3  # elevation of cameras, in radians


class Particles(nn.Module):
    """Latents (C, *S) or pixels (3, H, W) of N samples, each a parameter of its own: an optimiser
    leaves alone what a step did not draw."""

    def __init__(self, family: Family, config: ParticleConfig, count: int, device: Any) -> None:
        super().__init__()
        size = (config.resolution, config.resolution)
        pixels = config.parameters == "images"
        shape = (3, *family.image_size(config.resolution)) if pixels else family.sample_shape(*size)
        first = Ctx(config.seed, phase="particles", device=device).randn((count, *shape))
        self.rows = nn.ParameterList([*(0.5 * first if pixels else first)])
        self.of_latents = not pixels

    def forward(self, index: Tensor) -> Tensor:
        """(B, ...) of these particles."""
        return torch.stack([self.rows[i] for i in index.tolist()])


@dataclass(frozen=True)
class Made:
    """What an optimisation ended with. images: (N, 3, H, W) in [-1, 1], unclamped, None of voxels;
    scenes: of voxels. teacher: as it was before."""

    images: Tensor | None
    scenes: Sequence[VoxelScene]
    teacher: Family
    seconds: float
    num_steps: int


def optimise(
    source: str | Path | ModelSource,
    prompts: Sequence[Any],
    gradient: ScoreGradientConfig,
    config: ParticleConfig,
    folder: Path,
    *,
    teacher: Any = None,
    device: torch.device | str = "cpu",
    tell: Callable[[int, float], None] = lambda step, loss: None,
) -> Made:
    """Particles of each prompt, `num_particles` neighbours a prompt, after all steps; an equal call
    goes on, or finds them in `folder`.

    Args: source: loaded anew, as vsd's adapter stays on it. teacher: what it is known by (JSON), so
        that another's folder is refused. tell: called with each
        step and its loss (half the gradient's square, no measure of convergence).
    Errors: ValueError where `folder` holds another optimisation.
    """
    facts = {
        "settings": json_sha256([gradient.model_dump(), config.model_dump()]),
        "prompts": json_sha256([*prompts]),
        "teacher": json_sha256(teacher),
    }
    saved = fault_of(folder) is None
    if saved and (was := read_json(folder / "state.json", ("facts",))["facts"]) != facts:
        odd = next(name for name in facts if was.get(name) != facts[name])
        odd = f"{'another' if odd == 'teacher' else 'other'} {odd}"
        raise ValueError(
            f"output_dir: expected a new folder, or one of the same call, got {folder}, made with "
            f"{odd}. Choose another folder."
        )
    count = len(prompts) * config.num_particles
    voxels = config.parameters == "voxels"
    size = config.resolution
    guidance = ScoreGuidance(
        source,
        prompts,
        gradient,
        max_steps=config.max_steps,
        negative_prompt=config.negative_prompt,
        fake=config.fake,
        camera=voxels and gradient.kind == "vsd",
        resolution=size,
        seed=config.seed,
        device=device,
    )
    family = guidance.family
    particles: nn.Module
    if voxels:
        draws = (torch.Generator().manual_seed(config.seed + i) for i in range(count))
        particles = nn.ModuleList([VoxelScene(config.grid_size, one) for one in draws])
    else:
        particles = Particles(family, config, count, device)
    particles.to(device)
    optimizer = torch.optim.Adam(particles.parameters(), lr=config.learning_rate)
    begin, spent = 0, 0.0
    if saved:
        particles.load_state_dict(read_tensors(folder / "particles.safetensors"))
        load_optimizer_tensors(optimizer, read_tensors(folder / "optimizer.safetensors"))
        if (folder / "fake.safetensors").is_file():
            guidance.load_state_dict(read_tensors(folder / "fake.safetensors"))
        state = read_json(folder / "state.json", ("step", "seconds"))
        begin, spent = int(state["step"]), float(state["seconds"])
    start = last = time.monotonic()

    def save(step: int) -> None:
        tensors = {
            "particles": particles.state_dict(),
            "optimizer": optimizer_tensors(optimizer),
            "fake": guidance.state_dict(),
        }
        seconds = spent + time.monotonic() - start
        state = {"step": step, "seconds": seconds, "facts": facts}
        write_folder(folder, {k: v for k, v in tensors.items() if v}, {"state": state})

    for step in range(begin, config.max_steps):
        stop_if_orphaned()
        ctx = Ctx(config.seed, step, config.max_steps, "draw", device=torch.device(device))
        optimizer.zero_grad()
        if isinstance(particles, Particles):
            index = torch.arange(count)
            if config.batch_size is not None:
                index = ctx.rand(count).argsort()[: config.batch_size].cpu()
            rows = index // config.num_particles
            loss_of = guidance.of_latents if particles.of_latents else guidance
            loss = loss_of(particles(index), step, rows=rows)
        else:
            scene = step % count  # one a step: each has its own cameras
            bsz = config.batch_size or CAMERAS
            azimuth = 2 * torch.pi * ctx.stratified(bsz).float()
            elevation = LOWEST + (HIGHEST - LOWEST) * ctx.rand(bsz).float()
            camera = orbit(azimuth, elevation)
            images = particles[scene](camera, *guidance.size)
            rows = torch.full((bsz,), scene // config.num_particles)
            loss = guidance(images, step, SideInputs(camera=camera), rows=rows)
        loss.backward()
        optimizer.step()
        guidance.fit_fake(step)
        tell(step + 1, float(loss.detach()))
        if time.monotonic() - last > SAVE_SECONDS:
            save(step + 1)
            last = time.monotonic()
    if begin < config.max_steps:
        save(config.max_steps)
    seconds = spent + (time.monotonic() - start if begin < config.max_steps else 0.0)
    if not isinstance(particles, Particles):
        return Made(None, [*particles], family, seconds, config.max_steps)
    with torch.no_grad():
        values = [particles(part) for part in torch.arange(count).split(DECODED)]
        images = [guidance.bank.images(v) if particles.of_latents else v for v in values]
    return Made(torch.cat(images), [], family, seconds, config.max_steps)
