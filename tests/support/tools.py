"""Rules of ComfyUI 0.8, A1111 1.10.1 and sd-scripts (2026-02) for LoRA files, written from facts.

None of their code stands here: names of their modules, how they take a key apart, what they take
alpha for, and which sigmas their schedulers visit. Sources: ComfyUI comfy/lora.py, utils.py,
weight_adapter/lora.py, samplers.py, model_sampling.py; A1111 Lora/networks.py, network.py,
sd3_model.py; sd-scripts networks/lora.py, lora_sd3.py, lora_flux.py, lora_lumina.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# ------------------------------------------------------------ names of modules
# (Diffusers' module, the tool's, its place among q, k, v (and mlp) of one fused matrix)
_BLOCK = r"(layers|noise_refiner|context_refiner)\.(\d+)"
NAMES: dict[str, list[tuple[str, str]]] = {
    "sd3": [
        (r"transformer_blocks\.(\d+)\.(attn2?)\.to_([qkv])", r"joint_blocks.\1.x_block.\2.qkv"),
        (r"transformer_blocks\.(\d+)\.(attn2?)\.to_out\.0", r"joint_blocks.\1.x_block.\2.proj"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"joint_blocks.\1.x_block.mlp.fc1"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"joint_blocks.\1.x_block.mlp.fc2"),
    ],
    "flux": [
        (r"transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"double_blocks.\1.img_attn.qkv"),
        (r"transformer_blocks\.(\d+)\.attn\.to_out\.0", r"double_blocks.\1.img_attn.proj"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0"),
        (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2"),
        (r"single_transformer_blocks\.(\d+)\.attn\.to_([qkv])", r"single_blocks.\1.linear1"),
        (r"single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1"),
    ],
    "lumina2": [
        (_BLOCK + r"\.attn\.to_([qkv])", r"\1.\2.attention.qkv"),
        (_BLOCK + r"\.attn\.to_out\.0", r"\1.\2.attention.out"),
        (_BLOCK + r"\.feed_forward\.linear_(\d)", r"\1.\2.feed_forward.w\3"),
    ],
    "z_image": [
        (_BLOCK + r"\.attention\.to_([qkv])", r"\1.\2.attention.qkv"),
        (_BLOCK + r"\.attention\.to_out\.0", r"\1.\2.attention.out"),
        (_BLOCK + r"\.feed_forward\.w(\d)", r"\1.\2.feed_forward.w\3"),
    ],
    "qwen_image": [(r"(transformer_blocks\..+)", r"\1")],
    "wan": [
        (r"blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.self_attn.\2"),
        (r"blocks\.(\d+)\.attn2\.to_([qkv])", r"blocks.\1.cross_attn.\2"),
        (r"blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.self_attn.o"),
        (r"blocks\.(\d+)\.attn2\.to_out\.0", r"blocks.\1.cross_attn.o"),
        (r"blocks\.(\d+)\.ffn\.net\.0\.proj", r"blocks.\1.ffn.0"),
        (r"blocks\.(\d+)\.ffn\.net\.2", r"blocks.\1.ffn.2"),
    ],
}
# An LDM UNet of two levels, one block each, attention on the lower one.
_UNET = {
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.2.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
FAMILIES = ("sd_v", "sdxl", *NAMES)


def native_name(family: str, module: str) -> str | None:
    """The tools' name of a module of the tiny network; None where it is not among those here."""
    if family in NAMES:
        found = (
            re.sub(rf"^{a}$", b, module) for a, b in NAMES[family] if re.match(rf"^{a}$", module)
        )
        return next(found, None)
    for ours, theirs in _UNET.items():
        rest = module.removeprefix(f"{ours}.")
        if module == ours:
            return theirs
        if rest != module:
            return f"{theirs}.{_RESNET.get(rest, rest)}"
    return None


def native_places(family: str, net: Any) -> dict[str, list[tuple[str, int]]]:
    """Of each of the tools' modules the Diffusers modules it holds, in order, and their rows."""
    places: dict[str, list[tuple[str, int]]] = {}
    for path, module in net.named_modules():
        weight = module._parameters.get("weight")
        name = native_name(family, path.removesuffix(".base_layer"))
        if weight is not None and ".lora_" not in path and name is not None:
            entry = (path.removesuffix(".base_layer"), len(weight))
            places.setdefault(name, []).append(entry)
    for parts in places.values():  # q, k, v, then the mlp
        parts.sort(key=lambda part: (part[0].endswith("proj_mlp"), part[0]))
        order = {"to_q": 0, "to_k": 1, "to_v": 2}
        parts.sort(key=lambda part: order.get(part[0].rsplit(".", 1)[1], 3))
    return places


# ------------------------------------------------------------------- ComfyUI
def comfyui_key_map(
    family: str, places: Mapping[str, list[tuple[str, int]]]
) -> dict[str, tuple[str, int, int] | tuple[str]]:
    """stem -> (module) or (module, first row, rows) that a key of that stem changes."""
    found: dict[str, Any] = {}
    for name, parts in places.items():
        found["lora_unet_" + name.replace(".", "_")] = (name,)
        found[f"diffusion_model.{name}"] = (name,)
        row = 0
        for part, rows in parts:
            where = (name, row, rows)
            if family in ("sd_v", "sdxl"):
                found["lora_unet_" + part.replace(".", "_")] = (name,)
                short = part.replace(".to_", ".processor.to_")
                found["unet." + short.removesuffix(".0")] = (name,)
            if family in ("sd3", "flux", "qwen_image", "z_image"):
                found[f"transformer.{part}"] = where
            if family == "z_image":
                found[f"diffusion_model.{part}"] = where
            if family == "lumina2":  # mapped by Z-Image's names, which Diffusers gives it not
                theirs = part.replace(".attn.", ".attention.").replace("linear_", "w")
                found[f"diffusion_model.{theirs}"] = where
            row += rows
    return found


def comfyui_reads(
    tensors: Mapping[str, Tensor], family: str, places: Mapping[str, list[tuple[str, int]]]
) -> tuple[dict[str, Tensor], set[str]]:
    """(deltas by the tool's module, keys that it logs as not loaded)."""
    deltas: dict[str, Tensor] = {}
    used: set[str] = set()
    for stem, (name, *rows) in comfyui_key_map(family, places).items():
        for up, down in (("lora_up", "lora_down"), ("lora_B", "lora_A")):
            keys = (f"{stem}.{up}.weight", f"{stem}.{down}.weight")
            if keys[0] not in tensors:
                continue
            used |= {*keys, f"{stem}.alpha"} & set(tensors)
            alpha = tensors.get(f"{stem}.alpha")
            first, second = (tensors[key].float() for key in keys)
            scale = 1.0 if alpha is None else float(alpha) / len(second)
            delta = scale * (first.flatten(1) @ second.flatten(1))
            delta = delta.reshape(len(first), *second.shape[1:])
            total = sum(count for _, count in places[name])
            whole = deltas.setdefault(name, torch.zeros(total, *second.shape[1:]))
            start, count = rows or (0, total)
            whole[start : start + count] += delta
    return deltas, set(tensors) - used


# --------------------------------------------------------------------- A1111
def a1111_split(key: str, sd3: bool) -> tuple[str, str]:
    """(module, part) of a key; SD3's are split at their last two dots, and raise without them."""
    if sd3:
        name, first, second = key.rsplit(".", 2)
        return name, f"{first}.{second}"
    name, _, part = key.partition(".")
    return name, part


def a1111_version(metadata: Mapping[str, str]) -> str:
    """What its list of LoRAs takes a file for, and hides it by."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    if metadata.get("ss_v2") == "True":
        return "SD2"
    return "SD1" if metadata else "Unknown"


def a1111_lcm_sigmas(num_steps: int) -> list[int]:
    """Table indices of its LCM sampler with Schedule type Simple: one in twenty of 1000 is kept."""
    valid = [1000 - 1 - 20 * i for i in range(50)][::-1]
    return [valid[-(1 + int(i * len(valid) / num_steps))] for i in range(num_steps)]


# ---------------------------------------------------------------- sd-scripts
def sd_scripts_scales(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """alpha / rank of each module as SD3, Flux and Lumina 2 are read: KeyError without an alpha."""
    alphas, ranks = {}, {}
    for key, value in tensors.items():
        name = key.split(".")[0]
        if "alpha" in key:
            alphas[name] = float(value)
        elif "lora_down" in key:
            ranks[name] = len(value)
    return {name: alphas[name] / rank for name, rank in ranks.items()}


# ------------------------------------------------------------------ schedulers
class Sampling:
    """A table of sigmas, T of them from the cleanest on, and time by sigma and back."""

    def __init__(self, table: str, shift: float = 1.0) -> None:
        self.table, self.shift = table, shift
        if table == "vp":
            betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
            clean = torch.cumprod(1.0 - betas, dim=0)
            self.sigmas = (((1.0 - clean) / clean) ** 0.5).tolist()
        else:
            total = 10_000 if table == "flux" else 1000
            self.sigmas = [self.sigma(i / total) for i in range(1, total + 1)]

    def sigma(self, time: float) -> float:
        if self.table == "vp":
            low, part = math.floor(time), time - math.floor(time)
            high = self.sigmas[math.ceil(time)]
            return math.exp((1 - part) * math.log(self.sigmas[low]) + part * math.log(high))
        if self.table == "flux":
            return math.exp(self.shift) / (math.exp(self.shift) + 1.0 / time - 1.0)
        return self.shift * time / (1.0 + (self.shift - 1.0) * time)

    def time(self, sigma: float) -> float:
        """Of VP tables the nearest index; of flows sigma itself, which `sigma` shifts again."""
        if self.table != "vp":
            return sigma
        return min(range(1000), key=lambda i: abs(math.log(self.sigmas[i]) - math.log(sigma)))


def simple(sampling: Sampling, num_steps: int) -> list[float]:
    stride = len(sampling.sigmas) / num_steps
    return [sampling.sigmas[-(1 + int(i * stride))] for i in range(num_steps)]


def normal(sampling: Sampling, num_steps: int) -> list[float]:
    first, last = (sampling.time(sampling.sigmas[i]) for i in (-1, 0))
    return [sampling.sigma(t) for t in torch.linspace(first, last, num_steps).tolist()]


def sgm_uniform(sampling: Sampling, num_steps: int) -> list[float]:
    first, last = (sampling.time(sampling.sigmas[i]) for i in (-1, 0))
    return [sampling.sigma(t) for t in torch.linspace(first, last, num_steps + 1).tolist()[:-1]]


def ddim_uniform(sampling: Sampling, num_steps: int) -> list[float]:
    stride = max(len(sampling.sigmas) // num_steps, 1)
    return sampling.sigmas[1::stride][::-1]


SCHEDULERS = {
    "simple": simple,
    "normal": normal,
    "sgm_uniform": sgm_uniform,
    "ddim_uniform": ddim_uniform,
}
