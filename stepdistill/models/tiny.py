"""Tiny real Diffusers pipelines with random weights, built offline: for tests and dry runs.

Every class is the stock one; denoisers stay below 100,000 parameters. Random weights test
plumbing, never quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

TEXT_WIDTH = 16
MAX_TOKENS = 32  # CLIP's 77 costs time and tests nothing more
LATENT_SIZE = 8  # 16 px images with the factor-2 VAE


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within: torch's CPU generator starts at `seed`; outside it is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def clip_tokenizer(max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer: 256 byte symbols, the same as word ends, two specials."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable]
    symbols += [chr(256 + i) for i in range(256 - len(symbols))]  # GPT-2's names of other bytes
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=max_tokens)


def clip_config(tokenizer: CLIPTokenizer, width: int = TEXT_WIDTH) -> CLIPTextConfig:
    """A two-layer CLIP text configuration that fits the tokenizer."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A character-level T5 tokenizer and a one-layer encoder of that width."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    vocab = [*specials, *((chr(c), -3.0) for c in range(ord("!"), ord("~") + 1))]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=2 * width, d_kv=8, num_layers=1, num_heads=2
    )
    return tokenizer, T5EncoderModel(config)


def vae(scaling_factor: float, shift_factor: float | None = None) -> AutoencoderKL:
    """An AutoencoderKL of factor 2 and four latent channels."""
    blocks = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=2 * LATENT_SIZE,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
    )


def ddim(prediction_type: str = "epsilon", beta_schedule: str = "scaled_linear") -> DDIMScheduler:
    """Stable Diffusion's noise table (or DiT's linear one) with the stock DDIM rule."""
    betas = (0.00085, 0.012) if beta_schedule == "scaled_linear" else (0.0001, 0.02)
    return DDIMScheduler(
        beta_start=betas[0],
        beta_end=betas[1],
        beta_schedule=beta_schedule,
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def tiny_sd(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline; prediction_type "epsilon" or "v_prediction"."""
    with seeded(seed):
        tokenizer = clip_tokenizer()
        unet = UNet2DConditionModel(
            sample_size=LATENT_SIZE,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
        )
        return StableDiffusionPipeline(
            vae=vae(0.18215),
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=ddim(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sd3(with_t5: bool = False, seed: int = 0) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline, by default without T5, as people save it to spare memory."""
    with seeded(seed):
        tokenizer = clip_tokenizer()
        joint_width = 2 * TEXT_WIDTH
        transformer = SD3Transformer2DModel(
            sample_size=LATENT_SIZE,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=joint_width,
            caption_projection_dim=16,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=LATENT_SIZE,
        )
        tokenizer_3, text_encoder_3 = t5(joint_width) if with_t5 else (None, None)
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(1.5305, shift_factor=0.0609),
            text_encoder=CLIPTextModelWithProjection(clip_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )


def tiny_dit(seed: int = 0) -> DiTPipeline:
    """A DiTPipeline with 1,000 classes (the stock null class is 1000) and learned sigma."""
    with seeded(seed):
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            attention_bias=True,
            sample_size=LATENT_SIZE,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
        labels: Any = {0: "tench, Tinca tinca", 1: "goldfish"}
        return DiTPipeline(
            transformer=transformer,
            vae=vae(0.18215),
            scheduler=ddim(beta_schedule="linear"),
            id2label=labels,
        )


TINY: dict[str, Callable[[], Any]] = {
    "sd": tiny_sd,
    "sd_v": lambda: tiny_sd("v_prediction"),
    "sd3": tiny_sd3,
    "dit": tiny_dit,
}
"""Builder of each family's tiny pipeline by family name, variants beside it."""
