"""Samples of a causal video student: chunk by chunk behind its own clean frames, or all at once
from noised videos, each chunk at a time of its own; and its first regression.

    simulate  Self Forcing (Huang et al. 2025, arXiv:2506.08009): at the step that all chunks share
              the gradient reaches a chunk's last call alone; the past is a value, and so are its
              keys and values, which a call of its own at time 0 writes to a cache
    data      CausVid (Yin et al. 2024, arXiv:2412.07772): chunk-wise noised real videos, one call
    ode_loss  its initialisation: of the bidirectional teacher's trajectories, each chunk at a state
              of its own; frames that are clean already count for nothing
"""

# Shapes: B batch, C channels, F latent frames, H, W spatial, K steps.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from stepdistill.core.causal import Following
from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Nets, Setting
from stepdistill.core.path import rows
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Batch
from stepdistill.methods.rollout import Rollout, Sample


def chunk_steps(ctx: Ctx, bsz: int, frames: int, chunk: int, count: int) -> Tensor:
    """(B, F) a step below `count`, drawn for each chunk."""
    chunks = -(-frames // chunk)
    drawn = torch.stack([ctx.randint(0, count, bsz) for _ in range(chunks)], dim=1)
    return drawn.repeat_interleave(chunk, dim=1)[:, :frames]


def of_steps(times: Sequence[float], steps: Tensor) -> Tensor:
    """(B, F) float64 times of steps (B, F)."""
    return torch.tensor(times, dtype=torch.float64, device=steps.device)[steps]


@dataclass(frozen=True)
class CausalRollout(Rollout):
    """A rollout of a student that is causal by chunks. chunk: latent frames."""

    chunk: int = 3

    def sample_at(self, nets: Nets, batch: Batch, ctx: Ctx, k: int) -> Sample:
        """See Rollout.sample_at: at step k of every chunk, or at a step of each with data."""
        if self.config.rollout == "data":
            return self._of_videos(nets, batch, ctx)
        shape, path = (batch.bsz, *batch.shape), self.path
        noise, made, inputs = path.prior(ctx.randn(shape)), list[Tensor](), list[Tensor]()
        at = [ctx.times(t, batch.bsz) for t in self.times]
        with nets["student"].remembered() as remember:
            for start in range(0, shape[2], self.chunk):
                student, x = nets["student"], noise[:, :, start : start + self.chunk]
                if start and remember is not None:
                    remember(made[-1].detach(), batch.cond)
                elif remember is None:
                    past = torch.cat([noise[:, :, :0], *(x0.detach() for x0 in made)], dim=2)
                    student = Following(student, past)
                with torch.no_grad():
                    for t, s in pairwise(at[: k + 1]):
                        pred = student(x, t, batch.cond)
                        if self.config.sampler == "ode":
                            x = pred.step(s)
                        else:
                            x = path.add_noise(pred.x0, ctx.randn(tuple(x.shape)), s)
                inputs.append(x)
                made.append(student(x, at[k], batch.cond).x0)
        return Sample(torch.cat(made, dim=2), batch.cond, torch.cat(inputs, dim=2), at[k])

    def _of_videos(self, nets: Nets, batch: Batch, ctx: Ctx) -> Sample:
        x0 = batch.x0
        assert x0 is not None, "the trainer checks `needs`"
        steps = chunk_steps(ctx, batch.bsz, x0.shape[2], self.chunk, len(self.times))
        t = of_steps(self.times, steps)
        x_t = self.path.noised(x0, ctx.randn(tuple(x0.shape)), t)
        pred = nets["student"](x_t, t, batch.cond)
        return Sample(pred.x0, batch.cond, x_t, t.amax(1))


def ode_loss(
    nets: Nets,
    teacher: Denoiser,
    batch: Batch,
    ctx: Ctx,
    setting: Setting,
    teacher_steps: int,
    times: Sequence[float],
    chunk: int,
    guidance: float,
) -> Tensor:
    """Mean squared distance of the student's x0 from the teacher's end, over frames not clean yet.

    Args: times: the student's grid, descending. guidance: the teacher's, null + g (cond - null).
    """
    bsz, path = batch.bsz, setting.path
    even = torch.tensor(uniform_grid(teacher_steps, setting.shift), dtype=torch.float64)
    grid = sorted({*path.snap(even).tolist(), *times}, reverse=True)
    x, states = path.prior(ctx.randn((bsz, *batch.shape))), dict[float, Tensor]()
    with torch.no_grad():
        for t, s in pairwise((*grid, 0.0)):
            states[t] = x
            pred = teacher(x, ctx.times(t, bsz), batch.cond, batch.null, guidance)
            x = pred.x0 if s == 0.0 else pred.step(ctx.times(s, bsz))
    levels = [*(states[t] for t in times), x]
    steps = chunk_steps(ctx, bsz, x.shape[2], chunk, len(levels))
    x_t = x
    for k, state in enumerate(levels):
        x_t = torch.where(rows(steps == k, x), state, x_t)
    t = of_steps((*times, 0.0), steps)
    error = (nets["student"](x_t, t, batch.cond).x0 - x).square().mean((1, 3, 4))  # (B, F)
    noisy = (t > 0.0).to(error.dtype)
    return (error * noisy).sum() / noisy.sum().clamp_min(1.0)
