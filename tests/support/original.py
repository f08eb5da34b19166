"""Checkpoints in their authors' layout, written from Diffusers networks: converters read backwards.

Diffusers only reads such files, so tests that load one must write it themselves.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stepdistill.loading.original_layout import join, original_layout

_CLIP = "cond_stage_model.transformer.text_model."
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def denoiser_state(net: Any, prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    """The denoiser's whole state in the original layout, biases and norms included."""
    state, out, used = dict(net.state_dict()), {}, set()
    for place in original_layout(net):
        for leaf in ("weight", "bias"):
            tensors = {part: state.get(f"{part}.{leaf}") for part in place.parts}
            if all(value is not None for value in tensors.values()):
                out[f"{prefix}{place.name}.{leaf}"] = join(place, tensors).contiguous()
                used |= {f"{part}.{leaf}" for part in place.parts}
    for name in sorted(set(state) - used):
        assert name in _PLAIN, f"no original name for {name}"
        out[prefix + _PLAIN[name]] = state[name].contiguous()
    return out


_PLAIN = {"pos_embed.pos_embed": "pos_embed"}


def clip_state(encoder: Any) -> dict[str, Tensor]:
    """A CLIPTextModel in Stable Diffusion's layout."""
    return {
        _CLIP + name.removeprefix("text_model."): value.contiguous()
        for name, value in encoder.state_dict().items()
    }


def vae_state(vae: Any, prefix: str = "first_stage_model.") -> dict[str, Tensor]:
    """An AutoencoderKL in the LDM layout: attention as 1 x 1 convolutions, up blocks reversed."""
    levels = len(vae.config.block_out_channels)
    out = {}
    for name, value in vae.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if ".attentions." in module and value.ndim == 2:
            value = value[:, :, None, None]
        out[f"{prefix}{_vae_name(module, levels)}.{leaf}"] = value.contiguous()
    return out


def _vae_name(module: str, levels: int) -> str:
    half, _, rest = module.partition(".")
    if half not in ("encoder", "decoder"):
        return module  # quant_conv, post_quant_conv
    parts = rest.split(".")
    if parts[0] == "mid_block":
        inner = ".".join(parts[3:])
        if parts[1] == "attentions":
            return f"{half}.mid.attn_1.{_VAE_ATTENTION[inner]}"
        return f"{half}.mid.block_{int(parts[2]) + 1}.{inner}"
    if parts[0] in ("down_blocks", "up_blocks"):
        side = "down" if parts[0] == "down_blocks" else "up"
        level = int(parts[1]) if side == "down" else levels - 1 - int(parts[1])
        if parts[2] == "resnets":
            inner = ".".join(parts[4:]).replace("conv_shortcut", "nin_shortcut")
            return f"{half}.{side}.{level}.block.{parts[3]}.{inner}"
        return f"{half}.{side}.{level}.{side}sample.conv"
    return f"{half}.{rest.replace('conv_norm_out', 'norm_out')}"
