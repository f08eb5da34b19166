"""A small StableAudioPipeline and its training: seeded by step, so a run that is cut off goes on.

Loss: mean |v_theta(x_t, t, caption) - v|^2 on the trigonometric path, t stratified over the batch.
The text encoder's random weights stay: each word of a caption is a token of its own.
"""

# Shapes: B batch, C channels, L length.

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableAudioDiTModel, StableAudioPipeline, StableAudioProjectionModel
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from stepdistill.core.path import expand
from stepdistill.core.types import Cond
from stepdistill.demo.sound.data import HOP, KINDS, LENGTH, WORDS, caption, sounds
from stepdistill.demo.sound.mdct_vae import mdct_vae, to_latents
from stepdistill.families.stable_audio import StableAudioFamily
from stepdistill.reporting.bars import bar
from stepdistill.storage.files import write_atomic

FLOOR = 0.05  # of a channel's spread, in shares of the largest: silent ones are not blown up
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class SoundTeacher:
    """All that decides the weights."""

    seed: int = 0
    max_train_steps: int = 1500
    train_batch_size: int = 16
    learning_rate: float = 2e-3  # peak of a cosine with a short warm-up
    ema_decay: float = 0.995
    null_share: float = 0.1
    num_layers: int = 3
    num_heads: int = 4  # a width of two channels to each of the latents', without which x_t is lost
    text_width: int = 32


def channel_spread(seed: int = 0, number: int = 144) -> Tensor:
    """(C,) of the MDCT of that many sounds."""
    kinds = [i % len(KINDS) for i in range(number)]
    latents = to_latents(sounds(kinds, seed + 1), torch.ones(HOP).double())
    spread = latents.double().square().mean((0, 2)).sqrt()
    return spread.clamp_min(FLOOR * float(spread.max()))


def tokenizer() -> T5Tokenizer:
    """Each word of a caption is one token; other text is spelt."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -5.0)]
    words = [(f"▁{word}", -1.0) for word in WORDS]
    letters = [(chr(c), -10.0) for c in range(ord("!"), ord("~") + 1)]
    made: Any = T5Tokenizer(vocab=[*specials, *words, *letters], extra_ids=0)
    made.model_max_length = 8
    return made  # type: ignore[no-any-return]


def build(config: SoundTeacher) -> StableAudioPipeline:
    """The pipeline before training."""
    from diffusers import CosineDPMSolverMultistepScheduler

    torch.manual_seed(config.seed)
    words, width = tokenizer(), config.text_width
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(words), d_model=width, d_ff=2 * width, d_kv=16, num_layers=1, num_heads=2
        )
    )
    transformer = StableAudioDiTModel(
        sample_size=LENGTH,
        in_channels=HOP,
        out_channels=HOP,
        num_layers=config.num_layers,
        attention_head_dim=32,
        num_attention_heads=config.num_heads,
        num_key_value_attention_heads=config.num_heads,
        cross_attention_dim=32 * config.num_heads,
        time_proj_dim=64,
        global_states_input_dim=2 * width,
        cross_attention_input_dim=width,
    )
    return StableAudioPipeline(
        vae=mdct_vae(channel_spread(config.seed)),
        text_encoder=encoder,
        projection_model=StableAudioProjectionModel(width, width, 0, 512),
        tokenizer=words,
        transformer=transformer,
        scheduler=CosineDPMSolverMultistepScheduler(sigma_min=0.05, sigma_max=100.0),
    )


def train(config: SoundTeacher, folder: Path) -> tuple[Path, dict[str, Any]]:
    """(the saved pipeline, what the training took); goes on from FOLDER/teacher.pt."""
    out, state_file = folder / "teacher", folder / "teacher.pt"
    folder.mkdir(parents=True, exist_ok=True)
    family = StableAudioFamily(build(config))
    net, path, spread = family.net, family.path, channel_spread(config.seed)
    kinds = [caption(k) for k in range(len(KINDS))]
    conds, null = family.encode(kinds), family.null(1)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        params, config.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    average = {name: value.detach().clone() for name, value in net.state_dict().items()}
    done, seconds, mean = 0, 0.0, 1.0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        if state["config"] != asdict(config):
            raise ValueError(
                f"{state_file}: expected the training of {asdict(config)}, got {state['config']}. "
                "Name another folder."
            )
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        average, done, seconds, mean = (state[k] for k in ("average", "step", "seconds", "loss"))

    def save() -> None:
        facts = {"config": asdict(config), "step": done, "seconds": seconds, "loss": mean}
        weights = {"net": net.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
        write_atomic(state_file, lambda aside: torch.save({**facts, **weights}, aside))

    begun = saved = time.monotonic()
    net.train()
    for step in bar(range(done, config.max_train_steps), desc="teacher"):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(step, config.max_train_steps)
        loss = _loss(family, conds, null, spread, config, step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, value in net.state_dict().items():
                average[name].lerp_(value, 1 - decay)
        mean, done = mean + 0.02 * (float(loss.detach()) - mean), step + 1
        now = time.monotonic()
        seconds, begun = seconds + now - begun, now
        if now - saved > SAVE_SECONDS:
            save()
            saved = now
    save()
    net.load_state_dict(average)
    family.pipeline.save_pretrained(out)
    assert path is family.path
    return out, {"steps": done, "seconds": round(seconds, 1), "loss": round(mean, 4)}


def _rate(step: int, total: int) -> float:
    """Share of the peak: 50 steps of warm-up, then a cosine to 2 %."""
    if step < 50:
        return (step + 1) / 50
    angle = torch.tensor(torch.pi * (step - 50) / max(total - 50, 1))
    return float(0.02 + 0.49 * (1 + angle.cos()))


def _loss(
    family: StableAudioFamily,
    conds: Cond,
    null: Cond,
    spread: Tensor,
    config: SoundTeacher,
    step: int,
) -> Tensor:
    """Of the batch of that step."""
    bsz = config.train_batch_size
    draw = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    kinds = torch.randint(len(KINDS), (bsz,), generator=draw)
    x0 = to_latents(sounds(kinds.tolist(), config.seed, 1000 + step * bsz), spread)
    cond = conds.index(kinds).where_not(
        torch.rand(bsz, generator=draw) < config.null_share, null.repeat(bsz)
    )
    noise = torch.randn(x0.shape, generator=draw)
    u = (torch.arange(bsz) + torch.rand(bsz, generator=draw).double()) / bsz
    t = 0.5 - (1 - 2 * u).arcsin() / torch.pi  # more at both ends, where sampling begins and ends
    x_t = family.path.add_noise(x0, noise, t)
    alpha, sigma = (expand(c, x0) for c in family.path.coeffs(t))
    v = family.forward(family.net, x_t, family.path.model_time(t), cond)
    return (v - (alpha * noise - sigma * x0)).square().mean()
