"""Tiny real Diffusers pipelines with random weights, built offline: for tests and dry runs.

Every class is the stock one; denoisers stay below 100,000 parameters (but Z-Image's, whose
time embedding alone is larger). Random weights test plumbing, never quality.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from diffusers import (
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from stepdistill.config.layers import merge
from stepdistill.families.family import Family
from stepdistill.families.registry import FAMILIES
from stepdistill.testing.assembled import assemble
from stepdistill.testing.tiny_parts import (
    LATENT_SIZE,
    TEXT_WIDTH,
    clip_config,
    clip_tokenizer,
    ddim,
    seeded,
    t5,
    vae,
)


def unet(text_width: int, in_channels: int = 4, **extra: Any) -> UNet2DConditionModel:
    """A two-level UNet with cross-attention of that width on the lower one."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=text_width,
        attention_head_dim=2,
        **extra,
    )


def tiny_sd(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A StableDiffusionPipeline; prediction_type "epsilon" or "v_prediction"."""
    with seeded(seed):
        tokenizer = clip_tokenizer()
        return StableDiffusionPipeline(
            vae=vae(0.18215),
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            tokenizer=tokenizer,
            unet=unet(TEXT_WIDTH),
            scheduler=ddim(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def tiny_sdxl(seed: int = 0) -> StableDiffusionXLPipeline:
    """A StableDiffusionXLPipeline whose null prompt is zeros, as in the base checkpoint."""
    time_id_width = 8
    with seeded(seed):
        tokenizer = clip_tokenizer()
        return StableDiffusionXLPipeline(
            vae=vae(0.13025),
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            text_encoder_2=CLIPTextModelWithProjection(clip_config(tokenizer)),
            tokenizer=tokenizer,
            tokenizer_2=clip_tokenizer(),
            unet=unet(
                2 * TEXT_WIDTH,
                addition_embed_type="text_time",
                addition_time_embed_dim=time_id_width,
                projection_class_embeddings_input_dim=6 * time_id_width + TEXT_WIDTH,
            ),
            scheduler=ddim(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )


def tiny_sd3(with_t5: bool = False, version: str = "3", seed: int = 0) -> StableDiffusion3Pipeline:
    """A StableDiffusion3Pipeline, by default without T5, as people save it to spare memory.

    version: "3", or "3.5" with normalised queries and keys and a second attention to the image
        alone in the first block, as the medium checkpoint has.
    """
    extra: dict[str, Any] = {}
    if version == "3.5":
        extra = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}
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
            **extra,
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


def build(family: type[Family], variant: Mapping[str, Any], seed: int = 0, **changes: Any) -> Any:
    """A family's tiny pipeline, of a variant, with further changes like a variant's."""
    options = merge(variant, changes)
    if isinstance(family.tiny, str):
        module, _, function = family.tiny.partition(":")
        return getattr(import_module(module), function)(**options, seed=seed)
    pipeline = options.pop("pipeline", family.pipelines[0])
    return assemble(pipeline, merge(family.tiny, options), seed)


TINY_FAMILY: dict[str, type[Family]] = {
    name: family
    for family_name, family in FAMILIES.items()
    if family.tiny
    for name in (family_name, *family.variants)
}
"""The family of each tiny pipeline by its name, which is the family's or a variant's."""
TINY: dict[str, Callable[..., Any]] = {
    name: partial(build, family, family.variants.get(name, {}))
    for name, family in TINY_FAMILY.items()
}
"""Builder of each tiny pipeline."""
