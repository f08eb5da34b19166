"""The emoji teacher's networks: stock classes, small enough to ship and to train without a GPU.

AutoencoderKL (64 px to 8 x 8 x 8), CLIPTextModel, UNet2DConditionModel with v-prediction, DDIM
with zero terminal SNR (Lin et al. 2023, arXiv:2305.08891): a StableDiffusionPipeline.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from stepdistill.demo.teacher import assembled
from stepdistill.demo.text import WORD_END, clip_tokenizer, demo_text_encoder

from .captions import STYLES, TONES, Entry
from .data import IMAGE_PX

LATENT_PX, LATENT_CHANNELS = 8, 8
TEXT_WIDTH, MAX_TOKENS, NUM_TOKENS = 128, 24, 1280


def build_pipeline(entries: Sequence[Entry], seed: int = 0) -> StableDiffusionPipeline:
    """The untrained pipeline; its tokenizer knows the words of the entries' captions.

    Notes: weights depend on the seed alone; global random state is left as it was.
    """
    tokenizer = clip_tokenizer(_merges(entries), MAX_TOKENS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 24, 48, 96),  # few where the picture is large: that is the cost
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=1,  # groups of few channels would take each picture's colours away
            sample_size=IMAGE_PX,
        )
        _silence_branches(vae)
        unet = UNet2DConditionModel(
            sample_size=LATENT_PX,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            layers_per_block=1,
            block_out_channels=(64, 128),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=4,  # this class reads it as the NUMBER of heads
        )
        text_encoder = demo_text_encoder(tokenizer, TEXT_WIDTH, layers=2)
    networks = (vae.eval(), text_encoder.eval(), tokenizer, unet.eval())
    return assembled(*networks, "squaredcos_cap_v2")


def _silence_branches(vae: nn.Module) -> None:
    """Residual branches start at zero: the trunk, which is nearly linear, learns colours first.

    Source: Goyal et al. 2017, arXiv:1706.02677, section 5.1.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)


def _merges(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """Byte-pair merges of the words, so that most are one token and any other text still works."""
    texts = [f"{one.name} {one.group} {one.subgroup}" for one in entries]
    texts += [f"with {tone} skin in {style} style" for tone in TONES.values() for style in STYLES]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.train_from_iterator(
        sorted(set(texts)),
        trainers.BpeTrainer(
            vocab_size=NUM_TOKENS, end_of_word_suffix=WORD_END, show_progress=False
        ),
    )
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]
