"""The digits' teacher: a small text-to-image StableDiffusionPipeline trained on real digits.

Every part is a stock Diffusers or Transformers class, so the saved folder is an ordinary model:
identity AutoencoderKL, CLIPTextModel, UNet2DConditionModel with v-prediction, DDIMScheduler with
zero terminal SNR (Lin et al. 2023, arXiv:2305.08891), which makes one step from pure noise
well posed: at t = 999 alpha is 0 and x0 = -v.
"""

# L tokens, D text width

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from stepdistill.storage.folders import refuse_foreign, replacing
from stepdistill.testing.identity_vae import identity_vae

from .data import IMAGE_PX, Split
from .teacher_training import TeacherConfig, TrainingRecord, train_denoiser
from .text import demo_text_encoder, demo_tokenizer

RECORD = "demo_teacher.json"


@dataclass(frozen=True)
class Teacher:
    """A teacher on disk. `record` holds what its training took; `cached` says it was found."""

    folder: Path
    record: TrainingRecord
    cached: bool


def build_teacher(config: TeacherConfig, mean: float, std: float) -> StableDiffusionPipeline:
    """An untrained pipeline for images of the given pixel mean and spread.

    Notes: weights depend on config.seed alone; global random state is left as it was.
    """
    tokenizer = demo_tokenizer()
    channels = config.block_out_channels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = UNet2DConditionModel(
            sample_size=IMAGE_PX,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=channels,
            down_block_types=("DownBlock2D",) * len(channels),
            up_block_types=("UpBlock2D",) * len(channels),
            mid_block_type="UNetMidBlock2DCrossAttn",  # text enters here only: cheap, and enough
            norm_num_groups=8,
            cross_attention_dim=config.text_width,
            attention_head_dim=2,  # this class reads it as the NUMBER of heads
        )
        text_encoder = demo_text_encoder(tokenizer, config.text_width)
        vae = identity_vae(IMAGE_PX, mean, std)
    return assembled(vae, text_encoder, tokenizer, unet, config.beta_schedule)


def assembled(
    vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, beta_schedule: str
) -> StableDiffusionPipeline:
    """The demo's networks as a stock pipeline: v prediction, zero terminal SNR."""
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule=beta_schedule,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def train_teacher(
    config: TeacherConfig, train: Split, folder: Path, progress: bool = True
) -> Teacher:
    """Trains a teacher on `train` and saves it as a stock pipeline in `folder`.

    Notes: written beside `folder` first and moved at the end, so a stopped run leaves no half.
    """
    mean, std = round(float(train.images.mean()), 3), round(float(train.images.std()), 3)
    pipeline = build_teacher(config, mean, std)
    record = train_denoiser(pipeline, train, config, progress)
    content = {"key": config.key(), "config": dataclasses.asdict(config)}
    text = json.dumps({**content, "record": dataclasses.asdict(record)}, indent=2)
    with replacing(folder) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)
        (partial / RECORD).write_text(text + "\n")
    return Teacher(folder, record, cached=False)


def load_or_train_teacher(
    config: TeacherConfig, train: Split, folder: Path, progress: bool = True
) -> Teacher:
    """The teacher in `folder` if it was made from an equal config, else a new one in its place.

    Errors: ValueError where `folder` holds anything but a demo teacher.
    """
    if folder.exists() and any(folder.iterdir()):
        marker = folder / RECORD
        if not marker.is_file():
            raise ValueError(
                f"teacher folder: expected an empty folder or an earlier demo teacher, got {folder}"
                f" without {RECORD}. Choose another output_dir."
            )
        content = json.loads(marker.read_text())
        if content["key"] == config.key():
            return Teacher(folder, TrainingRecord(**content["record"]), cached=True)
        refuse_foreign(folder, "teacher folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    return train_teacher(config, train, folder, progress)


def quiet_loading() -> None:
    """No bars for loading weights: they take a blink and would hide the demo's own."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
