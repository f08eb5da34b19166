"""Tiny pipelines of classes without a family, for the generic one to listen to. See tiny.py."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LuminaNextDiT2DModel,
    LuminaPipeline,
)
from transformers import CLIPTextModel

from stepdistill.testing.tiny_parts import (
    LATENT_SIZE,
    TEXT_WIDTH,
    clip_config,
    clip_tokenizer,
    ddim,
    gemma,
    seeded,
    t5,
    vae,
)


def tiny_aura_flow(seed: int = 0) -> AuraFlowPipeline:
    """Flow, told t / 1000; masked tokens of zeros."""
    with seeded(seed):
        tokenizer, text_encoder = t5(TEXT_WIDTH)
        transformer = AuraFlowTransformer2DModel(
            sample_size=LATENT_SIZE,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            caption_projection_dim=16,
            pos_embed_max_size=16,
        )
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
        return AuraFlowPipeline(tokenizer, text_encoder, vae(0.13025), transformer, scheduler)


def tiny_cogview3(seed: int = 0) -> CogView3PlusPipeline:
    """v prediction on a table of shifted SNR, with sizes told to the network."""
    with seeded(seed):
        tokenizer, text_encoder = t5(TEXT_WIDTH)
        transformer = CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=TEXT_WIDTH,
            time_embed_dim=16,
            condition_dim=4,
            pos_embed_max_size=16,
            sample_size=LATENT_SIZE,
        )
        scheduler = CogVideoXDDIMScheduler(
            prediction_type="v_prediction", snr_shift_scale=4.0, timestep_spacing="trailing"
        )
        return CogView3PlusPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae(0.13025),
            transformer=transformer,
            scheduler=scheduler,
        )


def tiny_hunyuan_dit(seed: int = 0) -> HunyuanDiTPipeline:
    """Two encoders with masks, style and size inputs, rotary tables, learned variance."""
    with seeded(seed):
        tokenizer = clip_tokenizer(77)
        tokenizer_2, text_encoder_2 = t5(TEXT_WIDTH)
        transformer = HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=LATENT_SIZE,
            hidden_size=16,
            num_layers=2,
            mlp_ratio=2.0,
            cross_attention_dim=TEXT_WIDTH,
            cross_attention_dim_t5=TEXT_WIDTH,
            pooled_projection_dim=16,
        )
        return HunyuanDiTPipeline(
            vae=vae(0.13025, levels=4),
            text_encoder=CLIPTextModel(clip_config(tokenizer)),
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=ddim("v_prediction"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )


def tiny_lumina(seed: int = 0) -> LuminaPipeline:
    """Told 1 - t and a guided batch always: the generic family refuses it."""
    with seeded(seed):
        tokenizer, text_encoder = gemma(TEXT_WIDTH)
        transformer = LuminaNextDiT2DModel(
            sample_size=LATENT_SIZE,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            cross_attention_dim=TEXT_WIDTH,
        )
        return LuminaPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(0.13025, levels=4),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )


TINY_GENERIC: dict[str, Any] = {
    "aura_flow": tiny_aura_flow,
    "cogview3": tiny_cogview3,
    "hunyuan_dit": tiny_hunyuan_dit,
}
