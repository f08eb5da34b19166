"""Trains the emoji teacher: autoencoder, then denoiser with text encoder, then decoder alone.

Every phase can be killed at any instant and goes on from its last checkpoint: what batch k holds
depends on the seed and k alone. The decoder's last phase leaves the encoder, and with it the
latents that the denoiser knows, as they are.
"""

# B batch, N pictures, V variants

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stepdistill.core.context import stable_seed
from stepdistill.demo.teacher_training import v_loss
from stepdistill.demo.text import token_ids
from stepdistill.reporting.pictures import contact, png
from stepdistill.storage.checkpoints import discard, is_users, list_checkpoints, newest_valid
from stepdistill.storage.files import read_json, write_atomic
from stepdistill.storage.folders import write_folder

from .budget import Budget
from .captions import FULL_SHARE_AT_LAST, random_caption
from .data import VARIANTS, Emoji

CHECKPOINT_S, SNAPSHOT_S, LOG_S = 180, 600, 30
FINAL_PART = 0.2  # of a phase's pictures, over which its learning rate falls to nothing
KL_WEIGHT = 1e-4
NO_CAPTION_SHARE = 0.1  # so that guidance works
GRID_CAPTIONS = (
    *("slice of pizza", "delivery truck", "red apple", "tiger face", "cactus", "octopus"),
    *("woman firefighter with medium dark skin", "health worker with light skin in noto style"),
    *("fruit", "bird", "heart", "building", "smileys and emotion", "person role with dark skin"),
    *("face smiling in fluent style", "musical instrument"),
)


@dataclass
class Phase:
    """Networks trained together. loss: of batch k, drawn from a generator, told whether it is of
    the final part; snapshot: a picture of how the averaged weights do now."""

    name: str
    networks: nn.Module
    loss: Callable[[Generator, bool], Tensor]
    snapshot: Callable[[], np.ndarray]  # type: ignore[type-arg]
    pictures: int
    batch_size: int
    learning_rate: float
    ema_decay: float

    def run(self, folder: Path, seed: int, deadline: float) -> bool:
        """Train from the last checkpoint in folder/NAME on; True once all pictures were seen.

        Args: deadline: `time.monotonic()` after which it stops, saved. The networks are left
            with their averaged weights.
        """
        folder = folder / self.name
        folder.mkdir(parents=True, exist_ok=True)
        parameters: list[Tensor] = [p for p in self.networks.parameters() if p.requires_grad]
        average = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(
            parameters, self.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
        )
        seen, cpu = self._restore(folder, parameters, average, optimizer)
        steps = -(-self.pictures // self.batch_size)
        now = time.monotonic()
        saved = shown = logged = now
        since, running, cpu_start = seen, math.nan, time.process_time() - cpu
        self.networks.train()
        while seen < steps and now < deadline:
            left = (steps - seen) / (FINAL_PART * steps)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * min(1, (seen + 1) / 200, left)
            generator = Generator().manual_seed(stable_seed(seed, self.name, seen))
            loss = self.loss(generator, left < 1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            seen += 1
            decay = min(self.ema_decay, (seen + 1) / (seen + 10))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            value = float(loss.detach())
            running = value if math.isnan(running) else 0.98 * running + 0.02 * value
            now = time.monotonic()
            if now - logged > LOG_S:
                speed = (seen - since) * self.batch_size / (now - logged)
                hours = (steps - seen) * self.batch_size / speed / 3600
                print(
                    f"{time.strftime('%H:%M:%S')} {self.name}: {seen * self.batch_size:,} of "
                    f"{self.pictures:,} pictures, loss {running:.4f}, {speed:.1f} pictures/s, "
                    f"{hours:.1f} h left",
                    flush=True,
                )
                logged, since = now, seen
            if now - saved > CHECKPOINT_S or seen == steps or now >= deadline:
                cpu = time.process_time() - cpu_start
                self._save(folder, parameters, average, optimizer, seen, cpu)
                saved = now
            if now - shown > SNAPSHOT_S or seen == steps:
                self._show(folder, seen, parameters, average)
                shown = time.monotonic()
        self.networks.eval()
        with torch.no_grad():
            torch._foreach_copy_(parameters, average)
        return seen >= steps

    def _save(self, folder, parameters, average, optimizer, seen, cpu) -> None:  # type: ignore
        state = optimizer.state_dict()["state"]
        write_folder(
            folder / f"checkpoint-{seen}",
            {
                "weights": {str(k): p.detach() for k, p in enumerate(parameters)},
                "average": {str(k): p for k, p in enumerate(average)},
                "optimizer": {f"{k} {n}": v for k, one in state.items() for n, v in one.items()},
            },
            {"state": {"cpu_seconds": cpu, "pictures": seen * self.batch_size, "updates": seen}},
        )
        for old in list_checkpoints(folder)[:-1]:
            if not is_users(old):
                discard(old)

    def _restore(self, folder, parameters, average, optimizer) -> tuple[int, float]:  # type: ignore
        newest, _ = newest_valid(folder)
        if newest is None:
            return 0, 0.0
        with torch.no_grad():
            for name, tensors in (("weights", parameters), ("average", average)):
                stored = load_file(newest / f"{name}.safetensors")
                torch._foreach_copy_(tensors, [stored[str(k)] for k in range(len(tensors))])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(newest / "optimizer.safetensors").items():
            number, name = key.split()
            state.setdefault(int(number), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return int(newest.name.split("-")[1]), float(
            read_json(newest / "state.json", ["cpu_seconds"])["cpu_seconds"]
        )

    @torch.no_grad()
    def _show(self, folder: Path, seen: int, parameters: list, average: list) -> None:  # type: ignore
        training = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, average)
        self.networks.eval()
        picture = png(self.snapshot())
        write_atomic(
            folder / f"seen-{seen * self.batch_size:08d}.png", lambda p: p.write_bytes(picture)
        )
        self.networks.train()
        torch._foreach_copy_(parameters, training)


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    """L1 of pixels, of their differences and of 2, 4 and 8 times smaller pictures; the small ones,
    whose colour without brightness counts again, teach colour first, the differences keep edges."""
    loss = F.l1_loss(made, real)
    error = made - real
    loss = loss + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    for _ in range(3):
        error = F.avg_pool2d(error, 2)
        colour = error - error.mean(dim=1, keepdim=True)
        loss = loss + error.abs().mean() + colour.abs().mean()
    return loss


def autoencoder_phase(
    pipeline: StableDiffusionPipeline, emoji: Emoji, pictures: int, decoder_only: bool = False
) -> Phase:
    """The whole autoencoder, or its decoder (with the layer before it) on a fixed encoder."""
    vae, weights = pipeline.vae, emoji.weights()
    vae.requires_grad_(not decoder_only)
    vae.decoder.requires_grad_(True)
    vae.post_quant_conv.requires_grad_(True)
    batch = 8

    def loss(generator: Generator, final: bool) -> Tensor:
        index = torch.multinomial(weights, batch, True, generator=generator)
        variant = torch.randint(VARIANTS, (batch,), generator=generator)
        real = emoji.images(variant, index)
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(real).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            latents = posterior.mean + posterior.std * noise
        made = vae.decode(latents).sample
        total = reconstruction_loss(made, real)
        return (
            total if decoder_only else total + KL_WEIGHT * posterior.kl().mean() / noise[0].numel()
        )

    shown = torch.linspace(0, len(emoji.entries) - 1, 16).long()

    def snapshot() -> np.ndarray:  # type: ignore[type-arg]
        real = emoji.images(0, shown)
        return _grid(torch.cat([real, vae.decode(vae.encode(real).latent_dist.mode()).sample]), 16)

    name = "decoder" if decoder_only else "autoencoder"
    return Phase(name, vae, loss, snapshot, pictures, batch, 2e-3, 0.998)


def denoiser_phase(
    pipeline: StableDiffusionPipeline, emoji: Emoji, latents: Tensor, pictures: int
) -> Phase:
    """UNet and text encoder together, on latents (V, N, 8, 8, 8) of the frozen autoencoder.

    Loss: see `v_loss`.
    """
    weights, batch = emoji.weights(), 64
    networks = nn.ModuleList([pipeline.unet, pipeline.text_encoder]).requires_grad_(True)

    def loss(generator: Generator, final: bool) -> Tensor:
        index = torch.multinomial(weights, batch, True, generator=generator)
        variant = torch.randint(VARIANTS, (batch,), generator=generator)
        draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
        full_share = FULL_SHARE_AT_LAST if final else 0.0
        captions = [
            ""
            if draw.random() < NO_CAPTION_SHARE
            else random_caption(emoji.entries[k], draw, full_share)
            for k in index.tolist()
        ]
        text = pipeline.text_encoder(token_ids(pipeline.tokenizer, captions))[0]  # (B, L, D)
        x0 = latents[variant, index].float()
        return v_loss(pipeline.unet, pipeline.scheduler.alphas_cumprod, x0, text, generator)

    def snapshot() -> np.ndarray:  # type: ignore[type-arg]
        pipeline.set_progress_bar_config(disable=True)
        made = pipeline(
            list(GRID_CAPTIONS),
            num_inference_steps=20,
            guidance_scale=3.0,
            generator=Generator().manual_seed(0),
            output_type="np",
        ).images
        return contact([*(made * 255).round().astype(np.uint8)], columns=8)

    return Phase("denoiser", networks, loss, snapshot, pictures, batch, 1e-3, 0.9995)


@torch.no_grad()
def encode_all(pipeline: StableDiffusionPipeline, emoji: Emoji) -> Tensor:
    """(V, N, 8, 8, 8) float16 latents of every picture, each number about 1 in size; sets the
    autoencoder's scaling_factor."""
    vae, count = pipeline.vae, len(emoji.entries)
    rows = [
        torch.cat(
            [
                vae.encode(emoji.images(v, k)).latent_dist.mode()
                for k in torch.arange(count).split(64)
            ]
        )
        for v in range(VARIANTS)
    ]
    latents = torch.stack(rows)
    scale = 1 / float(latents.std())
    vae.register_to_config(scaling_factor=scale)
    return (latents * scale).half().contiguous()


def train(
    pipeline: StableDiffusionPipeline, emoji: Emoji, folder: Path, budget: Budget, seconds: float
) -> bool:
    """All phases, from where an earlier call stopped; True once the last is done.

    Args: seconds: how long this call may work.
    """
    deadline = time.monotonic() + seconds
    if not autoencoder_phase(pipeline, emoji, budget.autoencoder).run(
        folder, budget.seed, deadline
    ):
        return False
    pipeline.vae.requires_grad_(False)
    cached = folder / "latents.safetensors"
    if not cached.exists():
        latents = encode_all(pipeline, emoji)
        content = {"latents": latents, "scale": torch.tensor(pipeline.vae.config.scaling_factor)}
        write_atomic(cached, lambda path: save_file(content, path))
    stored = load_file(cached)
    pipeline.vae.register_to_config(scaling_factor=float(stored["scale"]))
    denoiser = denoiser_phase(pipeline, emoji, stored["latents"], budget.denoiser)
    if not denoiser.run(folder, budget.seed, deadline):
        return False
    decoder = autoencoder_phase(pipeline, emoji, budget.decoder, decoder_only=True)
    return decoder.run(folder, budget.seed, deadline)


def _grid(images: Tensor, columns: int) -> np.ndarray:  # type: ignore[type-arg]
    """Images (N, 3, H, W) in [-1, 1] as one picture."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return contact([*pixels], columns=columns)
