"""Trains the demo teacher's UNet and text encoder together, on one page.

Loss: mean |v_theta(x_t, t, prompt) - v|^2 with v = alpha eps - sigma x0
(Salimans and Ho 2022, arXiv:2202.00512, Appendix D), t stratified over the batch.
"""

# B batch, L tokens, D text width, K classes; class K stands for the empty prompt

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from stepdistill.reporting.bars import bar

from .data import DIGIT_NAMES, Split, prompt_for
from .text import token_ids

NUM_CLASSES = len(DIGIT_NAMES)
FINAL_LR_SHARE = 0.02
MAX_GRAD_NORM = 1.0
BUILD = 1  # part of the cache key: raise it when code that no field describes changes the result


@dataclass(frozen=True)
class TeacherConfig:
    """Everything that decides the teacher's weights, except the machine's arithmetic."""

    seed: int = 0
    max_train_steps: int = 2500
    max_train_seconds: float | None = None  # stops earlier; the learning rate still reaches its end
    train_batch_size: int = 64
    learning_rate: float = 3e-3  # peak of a cosine with linear warm-up
    lr_warmup_steps: int = 100
    ema_decay: float = 0.998
    null_prompt_share: float = 0.1  # prompts replaced by "" so that guidance works
    block_out_channels: tuple[int, ...] = (16, 32)
    text_width: int = 32
    beta_schedule: str = "squaredcos_cap_v2"

    def key(self) -> str:
        """A short hash of all fields: equal keys mean the same teacher."""
        fields = json.dumps({"build": BUILD, **dataclasses.asdict(self)}, sort_keys=True)
        return hashlib.sha256(fields.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class TrainingRecord:
    """What a training run took: steps done, wall-clock seconds, running mean of the loss."""

    steps: int
    seconds: float
    loss: float


def train_denoiser(
    pipeline: StableDiffusionPipeline, train: Split, config: TeacherConfig, progress: bool = True
) -> TrainingRecord:
    """Trains the pipeline's UNet and text encoder in place; their final weights are the EMA.

    Notes: ends at max_train_steps or max_train_seconds, whichever comes first; the learning rate
           follows the budget that is used up faster, so it has decayed in both cases.
    """
    unet, text_encoder = pipeline.unet, pipeline.text_encoder
    networks = nn.ModuleList([unet, text_encoder]).train()
    parameters = list(networks.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
    )
    averaged = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(config.seed + 1)
    alpha_bar = pipeline.scheduler.alphas_cumprod  # (T,)
    captions = [*(prompt_for(label) for label in range(NUM_CLASSES)), ""]
    latents, tokens = _latents(pipeline, train), token_ids(pipeline.tokenizer, captions)
    bsz, start, running = config.train_batch_size, time.perf_counter(), math.nan
    done = 0
    progress_bar = bar(
        total=config.max_train_steps, desc="teacher", unit="step", disable=not progress
    )
    for step in range(config.max_train_steps):
        used = _budget_used(config, step, time.perf_counter() - start)
        if used >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _lr_share(step, config.lr_warmup_steps, used)

        index = torch.randint(len(train), (bsz,), generator=generator)
        label = train.labels[index]
        label[torch.rand(bsz, generator=generator) < config.null_prompt_share] = NUM_CLASSES
        # All prompts are encoded once per step and handed out by class: K + 1 rows, not B.
        text = text_encoder(tokens)[0][label]  # (B, L, D)
        loss = v_loss(unet, alpha_bar, latents[index], text, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()

        decay = min(config.ema_decay, (step + 1) / (step + 10))  # forgets the start quickly
        _average(averaged, parameters, decay)
        value = float(loss.detach())
        running = value if math.isnan(running) else 0.98 * running + 0.02 * value
        done = step + 1
        progress_bar.update()
        if step % 10 == 0:
            progress_bar.set_postfix(loss=f"{running:.3f}", refresh=False)
    progress_bar.close()
    with torch.no_grad():
        for parameter, average in zip(parameters, averaged, strict=True):
            parameter.copy_(average)
    networks.eval().requires_grad_(False)
    return TrainingRecord(done, time.perf_counter() - start, running)


def v_loss(
    unet: nn.Module, alpha_bar: Tensor, x0: Tensor, text: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of v. Args: alpha_bar: (T,); x0: (B, C, H, W); text: (B, L, D)."""
    t = _stratified_times(len(x0), len(alpha_bar), generator)
    alpha, sigma = (x[:, None, None, None] for x in _coefficients(alpha_bar[t]))
    eps = torch.randn(x0.shape, generator=generator)
    v = unet(alpha * x0 + sigma * eps, t, encoder_hidden_states=text).sample
    return F.mse_loss(v, alpha * eps - sigma * x0)


@torch.no_grad()
def _latents(pipeline: StableDiffusionPipeline, train: Split) -> Tensor:
    latents: Tensor = pipeline.vae.encode(train.images).latent_dist.mode()
    return latents * float(pipeline.vae.config.scaling_factor)


def _stratified_times(bsz: int, num_times: int, generator: torch.Generator) -> Tensor:
    """(B,) table indices, one from each of B equal parts of the table: less noise in the loss."""
    part = torch.arange(bsz) + torch.rand(bsz, generator=generator)
    return (part / bsz * num_times).long().clamp_max(num_times - 1)


def _coefficients(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def _budget_used(config: TeacherConfig, step: int, seconds: float) -> float:
    share = step / config.max_train_steps
    limit = config.max_train_seconds
    return share if limit is None else max(share, seconds / limit)


def _lr_share(step: int, warmup_steps: int, used: float) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * used))
    warm = min(1.0, (step + 1) / max(1, warmup_steps))
    return warm * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


@torch.no_grad()
def _average(averaged: list[Tensor], current: Iterable[Tensor], decay: float) -> None:
    torch._foreach_lerp_(averaged, [parameter.detach() for parameter in current], 1 - decay)
