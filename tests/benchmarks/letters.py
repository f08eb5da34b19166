"""Two small teachers that are not the demo's, to hold default settings against: letters.

    apt install fonts-dejavu-core fonts-liberation fonts-freefont-ttf fonts-lato
    python tests/benchmarks/letters.py runs/letters --prediction v --fonts /usr/share/fonts/truetype
    stepdistill features train --train_data_dir runs/letters/pictures --output_dir runs/letters/net
    stepdistill compare --teacher runs/letters/v --train_data_dir runs/letters/pictures \\
        --reference runs/letters/pictures --prompts_file runs/letters/prompts.txt \\
        --features runs/letters/net/NAME --output_dir runs/letters/compared-v --budget 180s \\
        --methods dmd2 reflow ... --steps 1 2 4 --seeds 0 1 2

Stock StableDiffusion of 32 px in colour, 8 x 8 x 4 latents; a caption names a letter, often its
colour and style, so that it leaves a distribution. `--prediction epsilon`: the scheduler file of
SD 1.5, as most fine-tunes have (scaled-linear betas, leading spacing); `v`: zero terminal SNR.
Pictures, autoencoder and prompts are shared by both. All is seeded; a call that was cut off goes
on. Those of RESULTS.md saw 80,000 pictures (v) and 160,000 (eps); letters_compared.py is its table.
"""

# B batch, N pictures

from __future__ import annotations

import argparse
import colorsys
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from stepdistill.demo.emoji.training import KL_WEIGHT, Phase, reconstruction_loss
from stepdistill.demo.teacher import assembled
from stepdistill.demo.text import clip_tokenizer, demo_text_encoder, spelling, token_ids
from stepdistill.reporting.pictures import contact
from stepdistill.storage.folders import replacing

PX, NUM_PICTURES, TEXT_WIDTH, MAX_TOKENS = 32, 6000, 96, 16
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
HUES = {"red": 0.0, "yellow": 0.15, "green": 0.35, "blue": 0.6, "pink": 0.88}
STYLES = {  # beginnings of file names: faces of one style
    "sans": ("DejaVuSans", "LiberationSans", "FreeSans", "Lato"),
    "serif": ("DejaVuSerif", "LiberationSerif", "FreeSerif"),
    "mono": ("DejaVuSansMono", "LiberationMono", "FreeMono"),
}


def faces(folder: Path) -> dict[str, list[Path]]:
    """Font files by style; a file is of the longest beginning that fits it."""
    found: dict[str, list[Path]] = {style: [] for style in STYLES}
    for file in sorted(folder.rglob("*.ttf")):
        fitting = [
            (len(start), style)
            for style, starts in STYLES.items()
            for start in starts
            if file.name.startswith(start)
        ]
        if fitting:
            found[max(fitting)[1]].append(file)
    if missing := [style for style, files in found.items() if not files]:
        raise ValueError(f"fonts: expected files of each style in {folder}, got none of {missing}.")
    return found


def picture(letter: str, colour: str, face: Path, draw: random.Random) -> Image.Image:
    """32 px; size, place, tilt, shade and ground are drawn."""
    hue = HUES[colour] + draw.uniform(-0.03, 0.03)
    ink = _rgb(hue, draw.uniform(0.6, 1), draw.uniform(0.55, 0.9))
    ground = _rgb(draw.random(), draw.uniform(0, 0.25), draw.uniform(0.85, 1))
    image = Image.new("RGB", (4 * PX, 4 * PX), ground)
    font = ImageFont.truetype(str(face), int(4 * PX * draw.uniform(0.6, 0.9)))
    centre = tuple(4 * PX * (0.5 + draw.uniform(-0.07, 0.07)) for _ in "xy")
    ImageDraw.Draw(image).text(centre, letter, ink, font, anchor="mm")
    return image.rotate(draw.gauss(0, 6), fillcolor=ground).resize((PX, PX), Image.Resampling.BOX)


def _rgb(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue % 1, saturation, value))


def make_pictures(folder: Path, fonts: Path) -> None:
    """NUM_PICTURES as PNG with metadata.jsonl; what each shows lies beside in facts.json."""
    if folder.is_dir():
        return
    styles, draw = faces(fonts), random.Random(0)
    facts, lines = [], []
    with replacing(folder) as partial:
        partial.mkdir(exist_ok=True)
        for k in range(NUM_PICTURES):
            style, colour = draw.choice(sorted(styles)), draw.choice(sorted(HUES))
            letter = LETTERS[k % len(LETTERS)]
            picture(letter, colour, draw.choice(styles[style]), draw).save(partial / f"{k:05}.png")
            facts.append((letter, colour, style))
            lines.append({"file_name": f"{k:05}.png", "text": caption(facts[-1], draw)})
        (partial / "metadata.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
        (partial.parent / "facts.json").write_text(json.dumps(facts))


def caption(fact: tuple[str, str, str], draw: random.Random) -> str:
    """Wide or narrow: colour and style are left out half of the time each."""
    letter, colour, style = fact
    words = [colour] if draw.random() < 0.5 else []
    words += ["letter", letter.lower()]
    return " ".join(words + (["in", style] if draw.random() < 0.5 else []))


def build(prediction: str) -> StableDiffusionPipeline:
    """The untrained pipeline; weights depend on no global random state."""
    words = [*HUES, *STYLES, "letter", "in", *LETTERS.lower()]
    merges = [merge for word in words for merge in spelling(word)]
    tokenizer = clip_tokenizer([*dict.fromkeys(merges)], MAX_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(16, 32, 64),
            norm_num_groups=1,
            sample_size=PX,
        )
        unet = UNet2DConditionModel(
            sample_size=PX // 4,
            layers_per_block=1,
            block_out_channels=(64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,  # this class reads it as the NUMBER of heads
        )
        text_encoder = demo_text_encoder(tokenizer, TEXT_WIDTH)
    pipeline = assembled(vae, text_encoder, tokenizer, unet, "squaredcos_cap_v2")
    if prediction == "epsilon":
        betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        pipeline.scheduler = DDIMScheduler(
            prediction_type=prediction,
            timestep_spacing="leading",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            **betas,
        )
    return pipeline


def autoencoder_phase(vae: AutoencoderKL, pictures: Tensor, number: int) -> Phase:
    """As the emoji's."""

    def loss(generator: Generator, _final: bool) -> Tensor:
        real = pictures[torch.randint(len(pictures), (16,), generator=generator)]
        posterior = vae.encode(real).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        made = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / noise[0].numel()
        return reconstruction_loss(made, real) + KL_WEIGHT * kl

    def snapshot() -> np.ndarray:
        made = vae.decode(vae.encode(pictures[:16]).latent_dist.mode()).sample
        both = torch.cat([pictures[:16], made.clamp(-1, 1)]).permute(0, 2, 3, 1)
        return contact([*((both + 1) * 127.5).round().byte().numpy()], columns=16)

    return Phase("autoencoder", vae, loss, snapshot, number, 16, 2e-3, 0.998)


def denoiser_phase(
    pipeline: StableDiffusionPipeline, latents: Tensor, facts: list, number: int
) -> Phase:
    """UNet and text encoder together, on what the scheduler says the UNet predicts."""
    networks = nn.ModuleList([pipeline.unet, pipeline.text_encoder]).requires_grad_(True)
    scheduler = pipeline.scheduler

    def loss(generator: Generator, _final: bool) -> Tensor:
        index = torch.randint(len(latents), (64,), generator=generator)
        draw = random.Random(int(torch.randint(2**62, (), generator=generator)))
        captions = ["" if draw.random() < 0.1 else caption(facts[k], draw) for k in index.tolist()]
        ids = token_ids(pipeline.tokenizer, captions)
        x0 = latents[index]
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (len(x0),), generator=generator)
        made = pipeline.unet(
            scheduler.add_noise(x0, noise, t), t, pipeline.text_encoder(ids)[0]
        ).sample
        eps = scheduler.config.prediction_type == "epsilon"
        return F.mse_loss(made, noise if eps else scheduler.get_velocity(x0, noise, t))

    def snapshot() -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        prompts = [f"{hue} letter {letter}" for hue in HUES for letter in "abegkmrsx"]
        made = pipeline(
            prompts,
            num_inference_steps=25,
            guidance_scale=2.0,
            generator=Generator().manual_seed(0),
            output_type="np",
        ).images
        return contact([*(made * 255).round().astype(np.uint8)], columns=9)

    return Phase("denoiser", networks, loss, snapshot, number, 64, 1e-3, 0.9995)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """(N, 4, 8, 8) latents, each number about 1 in size; sets the scaling factor."""
    latents = torch.cat([vae.encode(x).latent_dist.mode() for x in pictures.split(64)])
    vae.register_to_config(scaling_factor=1 / float(latents.std()))
    return latents * vae.config.scaling_factor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prediction", choices=("epsilon", "v"), required=True)
    parser.add_argument("--fonts", type=Path, default=Path("/usr/share/fonts/truetype"))
    parser.add_argument("--autoencoder", type=int, default=20_000, help="pictures it sees")
    parser.add_argument("--denoiser", type=int, default=80_000, help="pictures it sees")
    args = parser.parse_args()
    make_pictures(args.folder / "pictures", args.fonts)
    files = sorted((args.folder / "pictures").glob("*.png"))
    raw = torch.from_numpy(np.stack([np.asarray(Image.open(file)) for file in files]))
    pictures = raw.permute(0, 3, 1, 2).float() / 127.5 - 1
    facts = json.loads((args.folder / "facts.json").read_text())
    prompts = [f"letter {letter}" for letter in LETTERS.lower()]
    prompts += [f"{hue} letter {letter}" for hue in HUES for letter in LETTERS.lower()]
    (args.folder / "prompts.txt").write_text("\n".join(prompts) + "\n")

    pipeline, deadline = build(args.prediction), time.monotonic() + 1e9
    autoencoder_phase(pipeline.vae, pictures, args.autoencoder).run(args.folder, 0, deadline)
    latents = encode_all(pipeline.vae.requires_grad_(False), pictures)
    phase = denoiser_phase(pipeline, latents, facts, args.denoiser)
    phase.run(args.folder / f"work-{args.prediction}", 0, deadline)
    with replacing(args.folder / args.prediction) as partial:
        pipeline.save_pretrained(partial)


if __name__ == "__main__":
    main()
