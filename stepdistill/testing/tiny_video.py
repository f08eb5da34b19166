"""Tiny pipelines with a video autoencoder: Qwen-Image's, Wan's. See tiny.py.

Such a VAE states no size, and the stock calls' defaults are large: a sample_size entry in its
config, which the stock classes keep, says what these are made for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from stepdistill.testing.tiny_parts import (
    LATENT_SIZE,
    TEXT_WIDTH,
    qwen_processor,
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


def qwen_transformer(**extra: Any) -> QwenImageTransformer2DModel:
    """Two blocks of width 16."""
    return QwenImageTransformer2DModel(
        in_channels=4 * 4,  # 2 x 2 patches of four latent channels
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(2, 2, 4),
        **extra,
    )


def qwen_vae(levels: int = 2) -> AutoencoderKLQwenImage:
    """Factor 2 ** (levels - 1)."""
    autoencoder = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * levels,
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 1),
        **LATENTS,
    )
    autoencoder.register_to_config(sample_size=2 ** (levels - 1) * LATENT_SIZE)
    return autoencoder


def qwen_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """With the dynamic shift of the released ones."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_image_seq_len=4,
        max_image_seq_len=LATENT_SIZE**2 // 4,
        shift_terminal=0.02,
    )


def tiny_qwen_image(seed: int = 0) -> QwenImagePipeline:
    """A QwenImagePipeline with dynamic shift, as released, and a factor-2 VAE."""
    with seeded(seed):
        return QwenImagePipeline(
            transformer=qwen_transformer(),
            scheduler=qwen_scheduler(),
            vae=qwen_vae(),
            text_encoder=qwen_vl(TEXT_WIDTH),
            tokenizer=qwen_tokenizer(),
        )


def tiny_qwen_image_edit(
    plus: bool = False, zero_cond_t: bool = False, vae_levels: int = 2, seed: int = 0
) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    """`tiny_qwen_image` that reads images. Its calls want `small_references`, or a VAE of 6 levels.

    plus: of the class for several. zero_cond_t: whether their tokens are told t = 0, as in 2511.
    """
    with seeded(seed):
        tokenizer = qwen_tokenizer(vision=True)
        return (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(
            transformer=qwen_transformer(zero_cond_t=zero_cond_t),
            scheduler=qwen_scheduler(),
            vae=qwen_vae(vae_levels),
            text_encoder=qwen_vl(TEXT_WIDTH, tokenizer),
            tokenizer=tokenizer,
            processor=qwen_processor(tokenizer),
        )


def small_references(side: int = 32) -> None:
    """From now on, in this process, the stock calls of Qwen-Image-Edit bring references to about
    side x side px in place of a megapixel, of which a tiny VAE makes a quarter million tokens.

    side: px, a multiple of 32.
    """
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        rule = _RULES.setdefault(module.__name__, module.calculate_dimensions)
        module.calculate_dimensions = partial(_smaller, rule, side * side)


_RULES: dict[str, Any] = {}


def _smaller(rule: Any, area: int, _asked: int, ratio: float) -> Any:
    return rule(area, ratio)


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
