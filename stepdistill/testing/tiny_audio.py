"""Tiny pipelines that make sound: Stable Audio's, ACE-Step's. See tiny.py."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    FlowMatchEulerDiscreteScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.pipelines.ace_step import AceStepConditionEncoder

from stepdistill.testing.tiny_parts import LATENT_SIZE, MAX_TOKENS, TEXT_WIDTH, qwen, seeded, t5

LENGTH = 2 * LATENT_SIZE  # latents of a sound


def oobleck(rate: int, channels: int = 1, length: int | None = None) -> AutoencoderOobleck:
    """Four latent channels, eight samples to a latent. Args: length: in latents, where stated."""
    autoencoder = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4],
        channel_multiples=[1, 1],
        decoder_channels=8,
        decoder_input_channels=4,
        audio_channels=channels,
        sampling_rate=rate,
    )
    if length is not None:
        autoencoder.register_to_config(sample_size=8 * length)
    return autoencoder


def tiny_stable_audio(seed: int = 0, **transformer: Any) -> StableAudioPipeline:
    """A StableAudioPipeline with its own scheduler, which Diffusers has beside torchsde."""
    from diffusers import CosineDPMSolverMultistepScheduler

    options = {
        "sample_size": LENGTH,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_attention_heads": 2,
        "out_channels": 4,
        "cross_attention_dim": 16,
        "time_proj_dim": 16,
        "global_states_input_dim": 2 * TEXT_WIDTH,
        "cross_attention_input_dim": TEXT_WIDTH,
    }
    with seeded(seed):
        tokenizer, encoder = t5(TEXT_WIDTH)
        tokenizer.model_max_length = MAX_TOKENS
        return StableAudioPipeline(
            vae=oobleck(1024, channels=2),
            text_encoder=encoder,
            projection_model=StableAudioProjectionModel(TEXT_WIDTH, TEXT_WIDTH, 0, 512),
            tokenizer=tokenizer,
            transformer=StableAudioDiTModel(**{**options, **transformer}),
            scheduler=CosineDPMSolverMultistepScheduler(),
        )


def tiny_ace_step(seed: int = 0, **transformer: Any) -> AceStepPipeline:
    """An AceStepPipeline of two seconds at 64 Hz, with silence that is not zero."""
    options = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    with seeded(seed):
        tokenizer, encoder = qwen(TEXT_WIDTH)
        condition = AceStepConditionEncoder(
            **options,
            text_hidden_dim=TEXT_WIDTH,
            timbre_hidden_dim=4,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
        )
        condition.silence_latent.normal_()
        return AceStepPipeline(
            vae=oobleck(64, length=LENGTH),
            text_encoder=encoder,
            tokenizer=tokenizer,
            transformer=AceStepTransformer1DModel(
                **{
                    **options,
                    "num_hidden_layers": 2,
                    "in_channels": 12,
                    "audio_acoustic_hidden_dim": 4,
                    "sliding_window": 4,
                    **transformer,
                }
            ),
            condition_encoder=condition,
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
        )
