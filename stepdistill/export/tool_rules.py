"""What ComfyUI, A1111 and sd-scripts know of a network: facts of their released code, as data.

ComfyUI 0.8: comfy/supported_models.py (shift, table of sigmas),
comfy/lora.py (names), nodes.py (types of text encoders). A1111 1.10.1: Lora/network.py. sd-scripts
2026-02: library/train_util.py, sai_model_spec.py, networks/. The modelspec names of what sd-scripts
does not train are musubi-tuner's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from stepdistill.export.tool_notes import usage


@dataclass(frozen=True)
class ToolRules:
    """One kind of network.

    architecture: modelspec.architecture, before "/lora". metadata: what sd-scripts writes beside it
    and A1111 sorts by. table: how ComfyUI makes sigmas: "vp" of Stable Diffusion's betas, "flow"
    k t / (1 + (k - 1) t) of 1,000 times, "flux" the same with k = exp(shift) of 10,000. shift: its
    own; shift_node: the node that sets another. clip: node and widgets that load the text encoders,
    None where the checkpoint holds them; vae: its file, None likewise. latent: node of the noise's
    shape. before_prompt: what the stock call puts before a prompt and ComfyUI does not. comfyui,
    a1111, sd_scripts: the formats that each reads whole.
    """

    architecture: str
    metadata: dict[str, str] = field(default_factory=dict)
    table: Literal["vp", "flow", "flux"] = "flow"
    shift: float = 1.0
    shift_node: str = "ModelSamplingSD3"
    in_one_checkpoint: bool = False  # whether people keep it in one checkpoint with its VAE
    clip: tuple[str, ...] | None = None
    vae: str | None = None
    latent: str = "EmptySD3LatentImage"
    before_prompt: str = ""
    comfyui: tuple[str, ...] = ("kohya", "comfyui")
    a1111: tuple[str, ...] = ()
    sd_scripts: tuple[str, ...] = ()


_ALL = ("lora", "kohya", "comfyui")
_KOHYA = ("kohya",)
_SD = ToolRules(
    "stable-diffusion-v1",
    {"ss_base_model_version": "sd_v1", "ss_v2": "False"},
    "vp",
    in_one_checkpoint=True,
    latent="EmptyLatentImage",
    a1111=_KOHYA,
    sd_scripts=_KOHYA,
)
_WAN = ToolRules(
    "wan2.1",
    shift=8.0,
    clip=("CLIPLoader", "umt5_xxl_fp16.safetensors", "wan", "default"),
    vae="wan_2.1_vae.safetensors",
    latent="EmptyHunyuanLatentVideo",
)
RULES: dict[str, ToolRules] = {
    "sd": _SD,
    "sd2": replace(
        _SD,
        architecture="stable-diffusion-v2-512",
        metadata={"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    ),
    "sdxl": replace(
        _SD,
        architecture="stable-diffusion-xl-v1-base",
        metadata={"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"},
    ),
    "sd3": ToolRules(
        "stable-diffusion-3-medium",
        {"ss_base_model_version": "medium"},
        shift=3.0,
        in_one_checkpoint=True,
        clip=(
            "TripleCLIPLoader",
            *("clip_l.safetensors", "clip_g.safetensors", "t5xxl_fp16.safetensors"),
        ),
        comfyui=_ALL,
        a1111=_KOHYA,
        sd_scripts=_KOHYA,
    ),
    "flux": ToolRules(
        "flux-1-dev",
        {"ss_base_model_version": "flux1"},
        "flux",
        shift=1.15,
        shift_node="ModelSamplingFlux",
        clip=(
            "DualCLIPLoader",
            *("clip_l.safetensors", "t5xxl_fp16.safetensors", "flux", "default"),
        ),
        vae="ae.safetensors",
        comfyui=_ALL,
        sd_scripts=_KOHYA,
    ),
    "lumina2": ToolRules(
        "lumina-2",
        {"ss_base_model_version": "lumina2"},
        shift=6.0,
        shift_node="ModelSamplingAuraFlow",
        clip=("CLIPLoader", "gemma_2_2b_fp16.safetensors", "lumina2", "default"),
        vae="ae.safetensors",
        before_prompt="You are an assistant designed to generate superior images with the superior "
        "degree of image-text alignment based on textual prompts or user prompts. <Prompt Start> ",
        sd_scripts=_KOHYA,
    ),
    "z_image": ToolRules(
        "Z-Image",
        shift=3.0,
        shift_node="ModelSamplingAuraFlow",
        clip=("CLIPLoader", "qwen_3_4b.safetensors", "lumina2", "default"),
        vae="ae.safetensors",
        comfyui=_ALL,
    ),
    "qwen_image": ToolRules(
        "Qwen-Image",
        shift=1.15,
        shift_node="ModelSamplingAuraFlow",
        clip=("CLIPLoader", "qwen_2.5_vl_7b.safetensors", "qwen_image", "default"),
        vae="qwen_image_vae.safetensors",
        comfyui=_ALL,
    ),
    "wan": _WAN,
    "wan_i2v": replace(_WAN, latent="WanImageToVideo"),
}
_KINDS = {
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "Lumina2Transformer2DModel": "lumina2",
    "ZImageTransformer2DModel": "z_image",
    "QwenImageTransformer2DModel": "qwen_image",
}
_SD2_TEXT_WIDTH = 1024
_WAN22_CHANNELS = 48


def tool_rules(net: nn.Module, reads_image: bool = False) -> ToolRules | None:
    """The rules of a network, None where other tools have no names for it."""
    kind, config = type(net).__name__, getattr(net, "config", None)
    if config is None:
        return None
    if kind == "UNet2DConditionModel":
        if config.addition_embed_type == "text_time":
            return RULES["sdxl"]
        return RULES["sd2" if config.cross_attention_dim == _SD2_TEXT_WIDTH else "sd"]
    if kind == "WanTransformer3DModel":
        if config.out_channels == _WAN22_CHANNELS:
            return replace(_WAN, vae="wan2.2_vae.safetensors", latent="Wan22ImageToVideoLatent")
        return RULES["wan_i2v" if reads_image else "wan"]
    if kind == "SD3Transformer2DModel" and config.qk_norm is not None:
        size = "5-medium" if config.dual_attention_layers else "5-large"
        metadata = {"ss_base_model_version": size}
        return replace(RULES["sd3"], architecture=f"stable-diffusion-3-{size}", metadata=metadata)
    if kind == "FluxTransformer2DModel" and not config.guidance_embeds:
        # ComfyUI gives a Flux without that embedding no shift of its own.
        return replace(
            RULES["flux"],
            architecture="flux-1-schnell",
            table="flow",
            shift_node="ModelSamplingAuraFlow",
            shift=1.0,
        )
    return RULES.get(_KINDS.get(kind, ""))


def readers(rules: ToolRules | None, form: str) -> list[str]:
    """The tools that read every key of a file of the format."""
    if rules is None:
        return []
    tools = {"ComfyUI": rules.comfyui, "A1111": rules.a1111, "sd-scripts": rules.sd_scripts}
    return [tool for tool, forms in tools.items() if form in forms]


def modelspec(rules: ToolRules, record: Mapping[str, Any], title: str) -> dict[str, str]:
    """Headers that tools sort and show a LoRA by. Source: ModelSpec 1.0.1, sd-scripts' words."""
    height, width = record["tools"]["size"]
    fields = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{rules.architecture}/lora",
        "implementation": "diffusers",
        "title": title,
        "resolution": f"{width}x{height}",
        "usage_hint": usage(record),
    }
    return {**rules.metadata, **{f"modelspec.{name}": text for name, text in fields.items()}}


def kohya_headers(adapters: Mapping[str, Any]) -> dict[str, str]:
    """Headers of sd-scripts' LoRA files. Args: adapters: see lora_formats.folded."""
    rank = str(max(len(lora.down) for lora in adapters.values()))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,
    }
