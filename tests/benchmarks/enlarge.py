"""Super-resolution by 8 in one step: scale distillation against direct training.

    python tests/benchmarks/enlarge.py --output_dir runs/enlarge --pictures emoji

Pictures of 32 px. photographs: crops of the two that scikit-learn ships, those with some contrast,
trained on their left three quarters, measured on the right one. emoji: the demo's, nine tenths
trained on. A small UNet of six channels (image and low resolution, of the full size) in
InstructPix2Pix's stock pipeline, v prediction and zero terminal SNR, on an autoencoder set by hand
to the identity. A teacher learns x2 from the images first; both ways begin with it and have equal
CPU seconds (an update of each kind is timed first, and as many are made). Chain: x4 from the
teacher, x8 from that, half of the time each. Direct: x8 on the images for all of it. PSNR (of the
mean squared error over all pictures), SSIM and the distance in a network that `features train`
makes of the pictures trained on, of the exported pipelines' own single call; bicubic enlargement
beside them.
Writes results.json and strip.png; a part that is there is not made again.
"""

# Shapes: B batch, H, W in px.

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from stepdistill import SuperResolutionTrainer, TrainConfig, Tuning
from stepdistill.data.degradation import Degradation
from stepdistill.data.degrade import degraded
from stepdistill.data.images import ImageFolderDataset
from stepdistill.demo.emoji.data import SHIPPED
from stepdistill.demo.emoji.teacher import load_pictures
from stepdistill.demo.teacher import assembled
from stepdistill.demo.text import demo_text_encoder, demo_tokenizer
from stepdistill.evaluation.learned import FeatureSettings, train_features
from stepdistill.evaluation.restoration import restoration
from stepdistill.losses.pixels import PixelOptions
from stepdistill.rewards.features import PixelFeatures
from stepdistill.testing.identity_vae import identity_vae

SIDE, LEFT, CHAIN = 32, 480, (4, 8)
CONTRAST = 0.2  # a crop's deviation at least, of [-1, 1]
CHANNELS, BATCH, TIMED = (16, 32, 32), 8, 8  # TIMED: updates that an update's cost is told by


def write_emoji(folder: Path) -> tuple[Path, Path]:
    """Folders of pictures to train on and to measure by."""
    seen, other = folder / "seen", folder / "other"
    for part in (seen, other):
        part.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(load_pictures(SHIPPED).pictures[0]):
        picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        picture.save((seen if number % 10 else other) / f"{number:04d}.png")
    return seen, other


def write_photographs(folder: Path) -> tuple[Path, Path]:
    """Folders of crops to train on and to measure by."""
    left, right = folder / "left", folder / "right"
    for part, columns, stride in ((left, (0, LEFT), 24), (right, (LEFT, 640), SIDE)):
        if part.is_dir():
            continue
        part.mkdir(parents=True)
        for number, photo in enumerate(load_sample_images().images):
            for top in range(0, photo.shape[0] - SIDE + 1, stride):
                for at in range(columns[0], columns[1] - SIDE + 1, stride):
                    crop = photo[top : top + SIDE, at : at + SIDE]
                    if crop.astype(float).std() / 127.5 > CONTRAST:
                        Image.fromarray(crop).save(part / f"{number}_{top:03d}_{at:03d}.png")
    return left, right


def read(folder: Path) -> Tensor:
    """(B, 3, H, W) in [-1, 1]."""
    arrays = [np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def write_untrained(folder: Path, images: Tensor, seed: int) -> Path:
    """The stock pipeline that every chain and every direct training of a seed begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=SIDE,
            in_channels=6,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=CHANNELS,
            down_block_types=("DownBlock2D",) * len(CHANNELS),
            up_block_types=("UpBlock2D",) * len(CHANNELS),
            mid_block_type="UNetMidBlock2D",
            norm_num_groups=8,
            cross_attention_dim=16,
        )
        tokenizer = demo_tokenizer()
        text_encoder = demo_text_encoder(tokenizer, 16)
    mean, std = round(float(images.mean()), 3), round(float(images.std()), 3)
    vae = identity_vae(SIDE, mean, std, channels=3)
    plain = assembled(vae, text_encoder, tokenizer, unet, "scaled_linear")
    parts = {**plain.components, "requires_safety_checker": False}
    StableDiffusionInstructPix2PixPipeline(**parts).save_pretrained(folder)
    return folder


def trainer_of(
    teacher: Path, data: Path, out: Path, factor: int, target: str, updates: int, seed: int
) -> SuperResolutionTrainer:
    dataset = ImageFolderDataset(data, SIDE, plain=True)
    dataset.degradation = Degradation(factor=factor, prompt="")
    args = TrainConfig(
        output_dir=str(out),
        tuning=Tuning(student="full"),
        max_train_steps=updates,
        train_batch_size=BATCH,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        adam_weight_decay=0.0,
        ema_decay=0.99,
        seed=seed,
        checkpointing_steps=0,
        validation_steps=0,
        logging_steps=50,
        disable_progress_bar=True,
    )
    options = {"target": target, "num_steps": 1, "weight": "none"}
    return SuperResolutionTrainer(str(teacher), args, dataset, method_config=options)


def seconds_per_update(teacher: Path, data: Path, scratch: Path, target: str) -> float:
    """CPU seconds, of one's loading and saving apart."""
    trainer = trainer_of(teacher, data, scratch / target, 4, target, 3 * TIMED, 0)
    trainer.train(until=TIMED)  # warm
    begun = time.process_time()
    trainer.train(until=3 * TIMED)
    return (time.process_time() - begun) / (2 * TIMED)


def trained(
    teacher: Path, data: Path, out: Path, factor: int, target: str, updates: int, seed: int
) -> tuple[Path, float]:
    """(export, CPU seconds of its training)."""
    folder, record = out / "pipeline", out / "seconds.json"
    if record.is_file():
        return folder, float(json.loads(record.read_text()))
    trainer = trainer_of(teacher, data, out, factor, target, updates, seed)
    begun = time.process_time()
    trainer.train()
    spent = time.process_time() - begun
    trainer.export(folder)
    record.write_text(json.dumps(spent))
    return folder, spent


def enlarge(folder: Path, images: Tensor, factor: int, seed: int = 0) -> Tensor:
    """(B, 3, H, W) in [0, 1]: the stock pipeline's single step on low resolutions of images."""
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    rule, made = Degradation(factor=factor), []
    for begin in range(0, len(images), 32):
        rows = [degraded(one, factor, rule, 0) for one in images[begin : begin + 32]]
        pictures = [pil(one) for one in rows]
        drawn = [torch.Generator().manual_seed(seed * 10_000 + begin + i) for i in range(len(rows))]
        result = pipe(
            [""] * len(rows),
            image=pictures,
            generator=drawn,
            num_inference_steps=1,
            guidance_scale=1,
            output_type="pt",
        )
        made.append(result.images)
    return torch.cat(made)


def pil(image: Tensor) -> Image.Image:
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def strip(path: Path, rows: Sequence[Tensor], number: int = 12) -> None:
    """A picture of the first ones of each, below one another, three times as large."""
    step = max(1, len(rows[0]) // number)
    lines = [torch.cat([*one[::step][:number]], dim=-1) for one in rows]
    image = pil(torch.cat(lines, dim=-2) * 2 - 1)
    image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST).save(path)


PICTURES = {"photographs": write_photographs, "emoji": write_emoji}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pictures", choices=[*PICTURES], default="photographs")
    parser.add_argument("--teacher_seconds", type=float, default=60.0, help="CPU seconds of x2")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of each way")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args(argv)
    out: Path = options.output_dir
    warnings.filterwarnings("ignore", message=".*has no effect")
    torch.set_num_threads(1)
    left, right = PICTURES[options.pictures](out / "pictures")
    images, wanted = read(left), read(right)
    network = train_features(
        left, out / "features", FeatureSettings(max_train_steps=100, train_batch_size=64)
    )
    judge = PixelFeatures(PixelOptions(network=str(network)))
    costs = out / "costs.json"
    if not costs.is_file():
        first = write_untrained(out / "first", images, 0)
        few = out / "few"  # latents and conditions are kept after their first use
        few.mkdir(exist_ok=True)
        for file in sorted(left.glob("*.png"))[: 2 * BATCH]:
            (few / file.name).write_bytes(file.read_bytes())
        cost = {t: seconds_per_update(first, few, out / "cost", t) for t in ("images", "teacher")}
        costs.write_text(json.dumps(cost))
    cost = json.loads(costs.read_text())
    rows: dict[str, list[dict[str, float]]] = {}
    shown: dict[str, Tensor] = {}

    def judged(name: str, made: Tensor, **more: float) -> None:
        values = restoration(made, (wanted + 1) / 2, judges={"distance": judge})
        shown.setdefault(name, made)
        squared = (10.0 ** (-values.pop("psnr").double() / 10)).mean()  # flat crops would outweigh
        means = {"psnr": float(-10 * squared.log10())} | {
            k: float(v.mean()) for k, v in values.items()
        }
        rows.setdefault(name, []).append(means | more)
        print(name, rows[name][-1], flush=True)

    rule = Degradation(factor=8)
    bicubic = torch.stack([degraded(one, 8, rule, 0) for one in wanted])
    judged("bicubic", (bicubic + 1) / 2)
    part = options.seconds / len(CHAIN)
    for seed in options.seeds:
        begin = write_untrained(out / f"untrained-{seed}", images, seed)
        updates = max(1, round(options.teacher_seconds / cost["images"]))
        begin, _ = trained(begin, left, out / f"teacher-{seed}", 2, "images", updates, seed)
        student, spent, total = begin, 0.0, 0
        for factor in CHAIN:
            updates = max(1, round(part / cost["teacher"]))
            where = out / f"chain-{seed}" / f"x{factor}"
            student, seconds = trained(student, left, where, factor, "teacher", updates, seed)
            spent, total = spent + seconds, total + updates
        judged("scale distillation", enlarge(student, wanted, 8), seconds=spent, updates=total)
        updates = max(1, round(options.seconds / cost["images"]))
        where = out / f"direct-{seed}"
        direct, spent = trained(begin, left, where, 8, "images", updates, seed)
        judged("direct", enlarge(direct, wanted, 8), seconds=spent, updates=updates)
    facts = {
        "teacher_seconds": options.teacher_seconds,
        "seconds": options.seconds,
        "seeds": options.seeds,
        "cost": cost,
        "rows": rows,
    }
    facts |= {"images": len(images), "measured": len(wanted)}
    (out / "results.json").write_text(json.dumps(facts, indent=1))
    low = [bicubic.add(1).div(2), shown["direct"], shown["scale distillation"], (wanted + 1) / 2]
    strip(out / "strip.png", low)


if __name__ == "__main__":
    main()
