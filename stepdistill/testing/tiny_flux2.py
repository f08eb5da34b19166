"""Tiny pipelines of Flux.2. See tiny.py."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stepdistill.testing.tiny_parts import LATENT_SIZE, TEXT_WIDTH, qwen_tokenizer, seeded

READ_LAYERS = 27  # the stock call of klein reads the hidden states after layers 9, 18 and 27
DEV_READ_LAYERS = 30  # and that of dev those after layers 10, 20 and 30
IMAGE_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
# The stock system message would fill the 512 tokens byte by byte: its first words stand for it.
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% for part in m['content'] %}{{ part['text'][:64] }}{% endfor %}{% endfor %}"
)


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
        return Flux2KleinPipeline(
            transformer=flux2_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae(),
            text_encoder=Qwen3ForCausalLM(text),
            tokenizer=tokenizer,
            is_distilled=is_distilled,
        )


def tiny_flux2_dev(seed: int = 0) -> Flux2Pipeline:
    """A Flux2Pipeline (dev): told the guidance, prompts through a Mistral 3 and its processor."""
    with seeded(seed):
        tokenizer = qwen_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": list(IMAGE_TOKENS)})
        text = {
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_WIDTH,
            "intermediate_size": TEXT_WIDTH,
            "num_hidden_layers": DEV_READ_LAYERS,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 8,
        }
        vision = {
            "model_type": "pixtral",
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 16,
            "patch_size": 4,
        }
        image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKENS[0])
        encoder = Mistral3Config(
            text_config=text, vision_config=vision, image_token_index=image_token
        )
        return Flux2Pipeline(
            # Any narrower sinusoid of the guidance can't be made constant: see flux_guidance.
            transformer=flux2_transformer(guidance_embeds=True, timestep_guidance_channels=256),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=flux2_vae(),
            text_encoder=Mistral3ForConditionalGeneration(encoder),
            tokenizer=PixtralProcessor(
                PixtralImageProcessor(patch_size=4), tokenizer, patch_size=4, chat_template=CHAT
            ),
        )


def flux2_transformer(
    guidance_embeds: bool = False, timestep_guidance_channels: int = 16
) -> Flux2Transformer2DModel:
    """Two joint and two single blocks, their gates opened."""
    net = Flux2Transformer2DModel(
        in_channels=4 * 4,  # 2 x 2 patches of four latent channels
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=3 * TEXT_WIDTH,
        timestep_guidance_channels=timestep_guidance_channels,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance_embeds,
    )
    for gates in (net.double_stream_modulation_img, net.single_stream_modulation):
        gates.linear.weight.data *= 4.0  # so small a time embedding leaves the blocks shut
    return net


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
