"""The nodes of ComfyUI that workflows here use: names, inputs, widgets, outputs and their types.

Source: ComfyUI 0.8, nodes.py and comfy_extras/nodes_*.py:
custom_sampler, edit_model, flux, hunyuan, images, model_advanced, qwen, sd3, wan.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """inputs: type by name of what a link brings; widgets: type by name of what is set, in order
    ("CONTROL" is the choice that the page puts behind a seed); outputs: types in order.
    """

    inputs: dict[str, str]
    widgets: dict[str, str]
    outputs: tuple[str, ...]


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split(":") for pair in text.split())


def _node(inputs: str, widgets: str, outputs: str) -> Node:
    return Node(_pairs(inputs), _pairs(widgets), tuple(outputs.split()))


_SIZE = "width:INT height:INT"
_VIDEO = f"{_SIZE} length:INT batch_size:INT"
_SEED = "INT control_after_generate:CONTROL"
_WEBP = "filename_prefix:STRING fps:FLOAT lossless:BOOLEAN quality:INT method:COMBO"
_GUIDED = "positive:CONDITIONING negative:CONDITIONING vae:VAE"
NODES: dict[str, Node] = {
    "CheckpointLoaderSimple": _node("", "ckpt_name:COMBO", "MODEL CLIP VAE"),
    "UNETLoader": _node("", "unet_name:COMBO weight_dtype:COMBO", "MODEL"),
    "CLIPLoader": _node("", "clip_name:COMBO type:COMBO device:COMBO", "CLIP"),
    "DualCLIPLoader": _node(
        "", "clip_name1:COMBO clip_name2:COMBO type:COMBO device:COMBO", "CLIP"
    ),
    "TripleCLIPLoader": _node("", "clip_name1:COMBO clip_name2:COMBO clip_name3:COMBO", "CLIP"),
    "VAELoader": _node("", "vae_name:COMBO", "VAE"),
    "LoadImage": _node("", "image:COMBO upload:IMAGEUPLOAD", "IMAGE MASK"),
    "CLIPVisionLoader": _node("", "clip_name:COMBO", "CLIP_VISION"),
    "CLIPVisionEncode": _node(
        "clip_vision:CLIP_VISION image:IMAGE", "crop:COMBO", "CLIP_VISION_OUTPUT"
    ),
    "LoraLoaderModelOnly": _node("model:MODEL", "lora_name:COMBO strength_model:FLOAT", "MODEL"),
    "ModelSamplingSD3": _node("model:MODEL", "shift:FLOAT", "MODEL"),
    "ModelSamplingAuraFlow": _node("model:MODEL", "shift:FLOAT", "MODEL"),
    "ModelSamplingFlux": _node("model:MODEL", f"max_shift:FLOAT base_shift:FLOAT {_SIZE}", "MODEL"),
    "ModelSamplingDiscrete": _node("model:MODEL", "sampling:COMBO zsnr:BOOLEAN", "MODEL"),
    "CLIPTextEncode": _node("clip:CLIP", "text:STRING", "CONDITIONING"),
    # Images to edit: as reference latents, of Qwen's nodes in the prompt's tokens too.
    "VAEEncode": _node("pixels:IMAGE vae:VAE", "", "LATENT"),
    "ReferenceLatent": _node("conditioning:CONDITIONING latent:LATENT", "", "CONDITIONING"),
    "TextEncodeQwenImageEdit": _node(
        "clip:CLIP vae:VAE image:IMAGE", "prompt:STRING", "CONDITIONING"
    ),
    "TextEncodeQwenImageEditPlus": _node(
        "clip:CLIP vae:VAE image1:IMAGE image2:IMAGE image3:IMAGE", "prompt:STRING", "CONDITIONING"
    ),
    # Images as channels beside the latent. Their latents are not used: the noise is plain.
    "LoadImageMask": _node("", "image:COMBO channel:COMBO upload:IMAGEUPLOAD", "MASK"),
    "InstructPixToPixConditioning": _node(
        f"{_GUIDED} pixels:IMAGE", "", "CONDITIONING CONDITIONING LATENT"
    ),
    "InpaintModelConditioning": _node(
        f"{_GUIDED} pixels:IMAGE mask:MASK",
        "noise_mask:BOOLEAN",
        "CONDITIONING CONDITIONING LATENT",
    ),
    "FluxGuidance": _node("conditioning:CONDITIONING", "guidance:FLOAT", "CONDITIONING"),
    "EmptyLatentImage": _node("", f"{_SIZE} batch_size:INT", "LATENT"),
    "EmptySD3LatentImage": _node("", f"{_SIZE} batch_size:INT", "LATENT"),
    "EmptyHunyuanLatentVideo": _node("", _VIDEO, "LATENT"),
    "Wan22ImageToVideoLatent": _node("vae:VAE start_image:IMAGE", _VIDEO, "LATENT"),
    "WanImageToVideo": _node(
        f"{_GUIDED} clip_vision_output:CLIP_VISION_OUTPUT start_image:IMAGE",
        _VIDEO,
        "CONDITIONING CONDITIONING LATENT",
    ),
    "KSampler": _node(
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        f"seed:{_SEED} steps:INT cfg:FLOAT sampler_name:COMBO scheduler:COMBO denoise:FLOAT",
        "LATENT",
    ),
    "KSamplerSelect": _node("", "sampler_name:COMBO", "SAMPLER"),
    "ManualSigmas": _node("", "sigmas:STRING", "SIGMAS"),
    "SamplerCustom": _node(
        "model:MODEL positive:CONDITIONING negative:CONDITIONING sampler:SAMPLER sigmas:SIGMAS "
        "latent_image:LATENT",
        f"add_noise:BOOLEAN noise_seed:{_SEED} cfg:FLOAT",
        "LATENT LATENT",
    ),
    "VAEDecode": _node("samples:LATENT vae:VAE", "", "IMAGE"),
    "SaveImage": _node("images:IMAGE", "filename_prefix:STRING", ""),
    "SaveAnimatedWEBP": _node("images:IMAGE", _WEBP, ""),
}
