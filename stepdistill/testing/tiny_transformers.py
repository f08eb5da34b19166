"""Tiny pipelines of the families around a text-conditioned transformer. See tiny.py."""

from __future__ import annotations

import diffusers
from diffusers import (
    AutoencoderDC,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import CLIPTextModel

from stepdistill.testing.tiny_parts import (
    LATENT_SIZE,
    TEXT_WIDTH,
    clip_config,
    clip_tokenizer,
    ddim,
    gemma,
    qwen,
    seeded,
    t5,
    vae,
)


def tiny_flux(guidance_embeds: bool = True, seed: int = 0) -> FluxPipeline:
    """A FluxPipeline like dev (guidance embedding, dynamic shift) or like schnell (neither)."""
    with seeded(seed):
        tokenizer = clip_tokenizer()
        tokenizer_2, text_encoder_2 = t5(TEXT_WIDTH)
        transformer = FluxTransformer2DModel(
            in_channels=4 * 4,  # 2 x 2 patches of four latent channels
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(2, 2, 4),
        )
        return FluxPipeline(
            transformer=transformer,
            # An image of the VAE's size has 16 tokens, the most that the shift is made for.
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0 if guidance_embeds else 1.0,
                use_dynamic_shifting=guidance_embeds,
                base_image_seq_len=4,
                max_image_seq_len=LATENT_SIZE**2 // 4,
            ),
            vae=vae(0.3611, shift_factor=0.1159),
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )


def tiny_pixart(
    pipeline: str = "PixArtAlphaPipeline", size_conditions: bool = False, seed: int = 0
) -> PixArtAlphaPipeline:
    """A PixArtAlphaPipeline or PixArtSigmaPipeline with learned sigma.

    size_conditions: told resolution and aspect ratio, as the stock call does at latent size 128.
    """
    with seeded(seed):
        tokenizer, text_encoder = t5(TEXT_WIDTH)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,  # three size embeddings share the width
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=24,
            sample_size=128 if size_conditions else LATENT_SIZE,
            patch_size=16 if size_conditions else 2,
            caption_channels=TEXT_WIDTH,
            use_additional_conditions=size_conditions,
            interpolation_scale=1,
        )
        return getattr(diffusers, pipeline)(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae(0.13025, attention=not size_conditions),  # it is quadratic in 128 x 128
            transformer=transformer,
            scheduler=ddim(beta_schedule="linear"),
        )


def tiny_sana(seed: int = 0) -> SanaPipeline:
    """A SanaPipeline with a factor-4 AutoencoderDC and a one-layer Gemma 2."""
    with seeded(seed):
        tokenizer, text_encoder = gemma(TEXT_WIDTH)
        transformer = SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=TEXT_WIDTH,
            sample_size=LATENT_SIZE,
        )
        autoencoder = AutoencoderDC(
            latent_channels=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8,) * 3,  # the stock call takes multiples of 32 px
            decoder_block_out_channels=(8,) * 3,
            encoder_layers_per_block=(1,) * 3,
            decoder_layers_per_block=(1,) * 3,
            encoder_qkv_multiscales=((),) * 3,
            decoder_qkv_multiscales=((),) * 3,
            scaling_factor=0.41407,
        )
        return SanaPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=autoencoder,
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )


def tiny_lumina2(seed: int = 0) -> Lumina2Pipeline:
    """A Lumina2Pipeline; its VAE has the factor 8 that the stock class takes for granted."""
    with seeded(seed):
        tokenizer, text_encoder = gemma(TEXT_WIDTH)
        transformer = Lumina2Transformer2DModel(
            sample_size=LATENT_SIZE,
            in_channels=4,
            hidden_size=16,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 32, 32),
            cap_feat_dim=TEXT_WIDTH,
        )
        return Lumina2Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=vae(0.3611, shift_factor=0.1159, levels=4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )


def tiny_z_image(seed: int = 0) -> ZImagePipeline:
    """A ZImagePipeline; the stock class fixes the 1024 hidden units of its time embedding."""
    with seeded(seed):
        tokenizer, text_encoder = qwen(TEXT_WIDTH)
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=16,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=TEXT_WIDTH,
            axes_dims=[4, 2, 2],
            axes_lens=[600, 32, 32],
        )
        return ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=vae(0.3611, shift_factor=0.1159),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
