"""Tiny pipelines with a video autoencoder: Qwen-Image's, Wan's. See tiny.py.

Such a VAE states no size, and the stock calls' defaults are large: a sample_size entry in its
config, which the stock classes keep, says what these are made for.
"""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)

from stepdistill.models.tiny_parts import (
    LATENT_SIZE,
    TEXT_WIDTH,
    qwen_tokenizer,
    qwen_vl,
    seeded,
)

# Of four latent channels, no two alike.
LATENTS: dict[str, Any] = {
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 2.0, 0.7, 1.0],
}


def tiny_qwen_image(seed: int = 0) -> QwenImagePipeline:
    """A QwenImagePipeline with dynamic shift, as released, and a factor-2 VAE."""
    with seeded(seed):
        transformer = QwenImageTransformer2DModel(
            in_channels=4 * 4,  # 2 x 2 patches of four latent channels
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=TEXT_WIDTH,
            axes_dims_rope=(2, 2, 4),
        )
        autoencoder = AutoencoderKLQwenImage(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[False],
            **LATENTS,
        )
        autoencoder.register_to_config(sample_size=2 * LATENT_SIZE)
        return QwenImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(
                use_dynamic_shifting=True,
                base_image_seq_len=4,
                max_image_seq_len=LATENT_SIZE**2 // 4,
                shift_terminal=0.02,
            ),
            vae=autoencoder,
            text_encoder=qwen_vl(TEXT_WIDTH),
            tokenizer=qwen_tokenizer(),
        )
