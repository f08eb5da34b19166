"""Parts of tiny pipelines: tokenizers without files, small text encoders, a VAE, a noise table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
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


def byte_symbols() -> list[str]:
    """GPT-2's printable names of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in printable]
    symbols += [chr(256 + i) for i in range(256 - len(symbols))]
    return symbols


def clip_tokenizer(max_tokens: int = MAX_TOKENS) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer: 256 byte symbols, the same as word ends, two specials."""
    symbols = byte_symbols()
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


def clip(width: int, max_tokens: int = MAX_TOKENS) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and a text model of that width."""
    tokenizer = clip_tokenizer(max_tokens)
    return tokenizer, CLIPTextModel(clip_config(tokenizer, width))


def t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A character-level T5 tokenizer and a one-layer encoder of that width."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    vocab = [*specials, *((chr(c), -3.0) for c in range(ord("!"), ord("~") + 1))]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=2 * width, d_kv=8, num_layers=1, num_heads=2
    )
    return tokenizer, T5EncoderModel(config)


def umt5(width: int) -> tuple[T5Tokenizer, UMT5EncoderModel]:
    """T5's tokenizer above with a one-layer UMT5 encoder of that width."""
    tokenizer, _ = t5(width)
    config = UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=2 * width, d_kv=8, num_layers=1, num_heads=2
    )
    return tokenizer, UMT5EncoderModel(config)


def gemma(width: int) -> tuple[GemmaTokenizer, Gemma2Model]:
    """A character-level Gemma tokenizer and a one-layer Gemma 2 of that width."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", "\n"]
    vocab = {t: i for i, t in enumerate([*specials, *map(chr, range(ord("!"), ord("~") + 1))])}
    tokenizer = GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True)  # as released
    config = Gemma2Config(
        vocab_size=len(vocab),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        query_pre_attn_scalar=8,
    )
    return tokenizer, Gemma2Model(config)


VISION_TOKENS = tuple(
    f"<|{name}|>"
    for name in ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
)


def qwen_tokenizer(vision: bool = False) -> Qwen2Tokenizer:
    """A byte-level Qwen tokenizer with a chat template. Args: vision: with VISION_TOKENS."""
    vocab = {token: i for i, token in enumerate([*byte_symbols(), "<|endoftext|>"])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    )
    if vision:
        tokenizer.add_special_tokens({"additional_special_tokens": list(VISION_TOKENS)})
    return tokenizer


def qwen(width: int) -> tuple[Qwen2Tokenizer, Qwen3Model]:
    """A byte-level Qwen tokenizer with a chat template, and a two-layer Qwen 3 of that width."""
    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return tokenizer, Qwen3Model(config)


def qwen_vl(
    width: int, tokenizer: Qwen2Tokenizer | None = None
) -> Qwen2_5_VLForConditionalGeneration:
    """A one-layer Qwen 2.5 VL of that width, for `qwen_tokenizer`.

    Args: tokenizer: one with VISION_TOKENS, of a model that sees images too.
    """
    text = {
        "vocab_size": len(qwen_tokenizer() if tokenizer is None else tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [width // 8, width // 16, width // 16],
        },
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    vision = {
        "depth": 1,
        "hidden_size": width,
        "intermediate_size": width,
        "num_heads": 2,
        "out_hidden_size": width,
        "patch_size": 4,
        "fullatt_block_indexes": [0],
    }
    ids = {} if tokenizer is None else vision_ids(tokenizer)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration(config)


def vision_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    """What a Qwen 2.5 VL's configuration has to say of a tokenizer with VISION_TOKENS."""
    names = ("vision_start", "vision_end", "image", "video")
    tokens = zip(names, VISION_TOKENS[2:], strict=True)
    return {f"{n}_token_id": tokenizer.convert_tokens_to_ids(token) for n, token in tokens}


def qwen_processor(tokenizer: Qwen2Tokenizer, tiny: bool = True) -> Qwen2VLProcessor:
    """What prepares images for a Qwen 2.5 VL; for `qwen_vl` 16 patches of 4 px of each, four of
    them one token. Args: tiny: else for a released one."""
    patches: dict[str, Any] = {"patch_size": 4} if tiny else {}
    size: dict[str, Any] = {"size": {"shortest_edge": 256, "longest_edge": 256}} if tiny else {}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**patches, **size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**patches),
        chat_template=tokenizer.chat_template,
    )


def vae(
    scaling_factor: float,
    shift_factor: float | None = None,
    attention: bool = True,
    levels: int = 2,
) -> AutoencoderKL:
    """An AutoencoderKL of four latent channels and factor 2 ** (levels - 1)."""
    blocks = ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels
    return AutoencoderKL(
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=2 ** (levels - 1) * LATENT_SIZE,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        mid_block_add_attention=attention,
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
