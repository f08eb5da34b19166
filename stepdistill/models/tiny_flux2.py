"""Tiny pipelines of Flux.2. See tiny.py."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from stepdistill.models.tiny_parts import LATENT_SIZE, TEXT_WIDTH, qwen_tokenizer, seeded

READ_LAYERS = 27  # the stock call reads the hidden states after layers 9, 18 and 27


def tiny_flux2(is_distilled: bool = False, seed: int = 0) -> Flux2KleinPipeline:
    """A Flux2KleinPipeline with the dynamic shift of the released ones and a factor-2 VAE."""
    with seeded(seed):
        tokenizer = qwen_tokenizer()
        text = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=TEXT_WIDTH,
            num_hidden_layers=READ_LAYERS,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
        )
        transformer = Flux2Transformer2DModel(
            in_channels=4 * 4,  # 2 x 2 patches of four latent channels
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=3 * TEXT_WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        )
        net = transformer
        for gates in (net.double_stream_modulation_img, net.single_stream_modulation):
            gates.linear.weight.data *= 4.0  # so small a time embedding leaves the blocks shut
        return Flux2KleinPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae(),
            text_encoder=Qwen3ForCausalLM(text),
            tokenizer=tokenizer,
            is_distilled=is_distilled,
        )


def flux2_vae() -> AutoencoderKLFlux2:
    """Factor 2, four latent channels; no two running means or variances of a patch alike."""
    autoencoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=2 * LATENT_SIZE,
        mid_block_add_attention=False,
    )
    autoencoder.bn.running_mean = torch.linspace(-0.3, 0.4, 16)
    autoencoder.bn.running_var = torch.linspace(0.5, 2.0, 16)
    return autoencoder
