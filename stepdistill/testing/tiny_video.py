"""Tiny pipelines with a video autoencoder: Qwen-Image's, Wan's. See tiny.py.

Such a VAE states no size, and the stock calls' defaults are large: a sample_size entry in its
config, which the stock classes keep, says what these are made for.
"""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from stepdistill.testing.tiny_parts import (
    LATENT_SIZE,
    TEXT_WIDTH,
    qwen_tokenizer,
    qwen_vl,
    seeded,
    umt5,
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


def wan_vae() -> AutoencoderKLWan:
    """Factor 4 in space and time: videos of 5 frames, 16 x 32 px, make 2 x 4 x 8 latents."""
    autoencoder = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        **LATENTS,
    )
    autoencoder.register_to_config(sample_size=[5, 16, 32])
    return autoencoder


def wan_transformer(in_channels: int = 4, **extra: Any) -> WanTransformer3DModel:
    """Two blocks of width 24."""
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
        **extra,
    )


def wan_scheduler() -> UniPCMultistepScheduler:
    """The scheduler of the released checkpoints: UniPC on shifted flow sigmas."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def tiny_wan(
    expand_timesteps: bool = False, boundary_ratio: float | None = None, seed: int = 0
) -> WanPipeline:
    """A WanPipeline like 2.1's, like 2.2's 5B, which has a time for each token, or with two experts
    like its A14B."""
    with seeded(seed):
        tokenizer, text_encoder = umt5(TEXT_WIDTH)
        return WanPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=wan_vae(),
            scheduler=wan_scheduler(),
            transformer=wan_transformer(),
            transformer_2=None if boundary_ratio is None else wan_transformer(),
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
        )


def tiny_wan_i2v(
    expand_timesteps: bool = False, boundary_ratio: float | None = None, seed: int = 0
) -> WanImageToVideoPipeline:
    """A WanImageToVideoPipeline like 2.1's, with 2.2's 5B model, which keeps the first frame, or
    with two experts like its A14B, which read no CLIP tokens."""
    with seeded(seed):
        tokenizer, text_encoder = umt5(TEXT_WIDTH)
        parts: dict[str, Any] = {}
        extra: dict[str, Any] = {} if expand_timesteps else {"in_channels": 4 + 4 + 4}
        if not expand_timesteps and boundary_ratio is None:
            config = CLIPVisionConfig(
                hidden_size=TEXT_WIDTH,
                intermediate_size=TEXT_WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=16,
                patch_size=8,
            )
            parts["image_encoder"] = CLIPVisionModel(config)
            sides = {"height": 16, "width": 16}
            parts["image_processor"] = CLIPImageProcessor(size=sides, crop_size=sides)
            extra |= {"image_dim": TEXT_WIDTH, "added_kv_proj_dim": 24}
        return WanImageToVideoPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=wan_vae(),
            scheduler=wan_scheduler(),
            transformer=wan_transformer(**extra),
            transformer_2=None if boundary_ratio is None else wan_transformer(**extra),
            boundary_ratio=boundary_ratio,
            expand_timesteps=expand_timesteps,
            **parts,
        )
