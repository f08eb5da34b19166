"""Where the modules of a Diffusers denoiser stand in the checkpoint of its authors.

Tools other than Diffusers (ComfyUI, A1111, kohya's scripts) name weights after the original
networks: an LDM UNet counts input and output blocks, transformers hold q, k and v in one matrix.
The tables follow Diffusers' single-file converters, which are the same map read backwards.
"""

# Shapes: O rows (outputs) and I columns (inputs) of a weight.

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """One original module: the Diffusers modules whose rows it holds, in order.

    swapped: its two halves of rows stand the other way round (shift, scale against scale, shift).
    """

    name: str
    parts: tuple[str, ...]
    swapped: bool = False


def original_layout(net: Any) -> list[Place]:
    """The places of all weights of `net` (a Diffusers denoiser) that exist there.

    Errors: ValueError for a class without a table here.
    """
    kind = type(net).__name__
    if kind not in LAYOUTS:
        raise ValueError(
            f"original layout: expected one of {sorted(LAYOUTS)}, got {kind}: other tools have no "
            "names of their own for it that are known here."
        )
    return list(LAYOUTS[kind](net))


def has_layout(net: nn.Module) -> bool:
    """Whether `original_layout` knows the class."""
    return type(net).__name__ in LAYOUTS


def swap_halves(rows: Tensor) -> Tensor:
    """(O, ...) with its first and second half of rows exchanged."""
    first, second = rows.chunk(2, dim=0)
    return torch.cat([second, first], dim=0)


def join(place: Place, tensors: dict[str, Tensor]) -> Tensor:
    """The original (O, ...) of the parts' tensors by Diffusers name."""
    rows = torch.cat([tensors[part] for part in place.parts], dim=0)
    return swap_halves(rows) if place.swapped else rows


def split(place: Place, rows: Tensor, counts: dict[str, int]) -> dict[str, Tensor]:
    """The parts' tensors by Diffusers name of an original (O, ...): `join` undone.

    Args: counts: rows of each part.
    """
    rows = swap_halves(rows) if place.swapped else rows
    pieces = rows.split([counts[part] for part in place.parts], dim=0)
    return dict(zip(place.parts, pieces, strict=True))


# ----------------------------------------------------------------------- UNets
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "class_embedding": "label_emb",  # of the x4 upscaler
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def _leaves(net: nn.Module) -> Iterator[str]:
    """Stock names of modules that hold a weight; an adapter's own and its wrapper are no names."""
    for name, module in net.named_modules():
        parameters = dict(module.named_parameters(recurse=False))
        if "weight" in parameters and ".lora_" not in f".{name}":
            yield name.removesuffix(".base_layer")


def _unet(net: Any) -> Iterator[Place]:
    per_block = net.config.layers_per_block + 1
    for name in _leaves(net):
        yield Place(_UNET.get(name) or _unet_block(net, name, per_block), (name,))


def _unet_block(net: Any, name: str, per_block: int) -> str:
    if name.startswith("mid_block."):
        _, kind, index, rest = name.split(".", 3)
        at = 2 * int(index) if kind == "resnets" else 1
        return f"middle_block.{at}.{_inner(kind, rest)}"
    side, block, kind, index, rest = name.split(".", 4)
    first = int(block) * per_block
    if kind == "downsamplers":
        return f"input_blocks.{first + per_block}.0.op"
    if kind == "upsamplers":
        after = 2 if _has_attention(net, side, int(block)) else 1
        return f"output_blocks.{first + per_block - 1}.{after}.conv"
    at = first + int(index) + (1 if side == "down_blocks" else 0)
    where = "input_blocks" if side == "down_blocks" else "output_blocks"
    return f"{where}.{at}.{0 if kind == 'resnets' else 1}.{_inner(kind, rest)}"


def _has_attention(net: Any, side: str, block: int) -> bool:
    types = net.config.up_block_types if side == "up_blocks" else net.config.down_block_types
    return "Attn" in types[block]


def _inner(kind: str, rest: str) -> str:
    return _RESNET[rest] if kind == "resnets" else rest


# ---------------------------------------------------------------- transformers
Rows = Iterable[tuple[str, tuple[str, ...], bool]]


def _table(rows: Callable[[Any], Rows]) -> Callable[[Any], Iterator[Place]]:
    """A layout of the rows (original, parts, swapped) whose parts the network has."""

    def places(net: Any) -> Iterator[Place]:
        there = set(_leaves(net))
        for name, parts, swapped in rows(net.config):
            if there.issuperset(parts):
                yield Place(name, parts, swapped)

    return places


def _one(name: str, part: str, swapped: bool = False) -> tuple[str, tuple[str, ...], bool]:
    return name, (part,), swapped


def _qkv(name: str, block: str, *parts: str) -> tuple[str, tuple[str, ...], bool]:
    return name, tuple(f"{block}.{part}" for part in parts), False


def _sd3(config: Any) -> Rows:
    yield _one("x_embedder.proj", "pos_embed.proj")
    yield _one("context_embedder", "context_embedder")
    for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder")):
        for i, j in ((1, 0), (2, 2)):
            yield _one(f"{theirs}.mlp.{j}", f"time_text_embed.{ours}.linear_{i}")
    for i in range(config.num_layers):
        block, image, text = (
            f"transformer_blocks.{i}",
            f"joint_blocks.{i}.x_block",
            f"joint_blocks.{i}.context_block",
        )
        last = i == config.num_layers - 1  # its text half only feeds attention
        yield _qkv(f"{image}.attn.qkv", f"{block}.attn", "to_q", "to_k", "to_v")
        yield _qkv(f"{text}.attn.qkv", f"{block}.attn", "add_q_proj", "add_k_proj", "add_v_proj")
        yield _qkv(f"{image}.attn2.qkv", f"{block}.attn2", "to_q", "to_k", "to_v")
        yield _one(f"{image}.attn.proj", f"{block}.attn.to_out.0")
        yield _one(f"{image}.attn2.proj", f"{block}.attn2.to_out.0")
        yield _one(f"{text}.attn.proj", f"{block}.attn.to_add_out")
        yield _one(f"{image}.adaLN_modulation.1", f"{block}.norm1.linear")
        yield _one(f"{text}.adaLN_modulation.1", f"{block}.norm1_context.linear", swapped=last)
        for ours, theirs in (("ff", image), ("ff_context", text)):
            yield _one(f"{theirs}.mlp.fc1", f"{block}.{ours}.net.0.proj")
            yield _one(f"{theirs}.mlp.fc2", f"{block}.{ours}.net.2")
        for norm, ours in (("ln_q", "norm_q"), ("ln_k", "norm_k")):
            yield _one(f"{image}.attn.{norm}", f"{block}.attn.{ours}")
            yield _one(f"{image}.attn2.{norm}", f"{block}.attn2.{ours}")
            added = ours.replace("norm_", "norm_added_")
            yield _one(f"{text}.attn.{norm}", f"{block}.attn.{added}")
    yield _one("final_layer.linear", "proj_out")
    yield _one("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)


def _flux(config: Any) -> Rows:
    yield _one("img_in", "x_embedder")
    yield _one("txt_in", "context_embedder")
    for ours, theirs in (
        ("timestep_embedder", "time_in"),
        ("text_embedder", "vector_in"),
        ("guidance_embedder", "guidance_in"),
    ):
        yield _one(f"{theirs}.in_layer", f"time_text_embed.{ours}.linear_1")
        yield _one(f"{theirs}.out_layer", f"time_text_embed.{ours}.linear_2")
    for i in range(config.num_layers):
        block, theirs = f"transformer_blocks.{i}", f"double_blocks.{i}"
        yield _qkv(f"{theirs}.img_attn.qkv", f"{block}.attn", "to_q", "to_k", "to_v")
        yield _qkv(
            f"{theirs}.txt_attn.qkv", f"{block}.attn", "add_q_proj", "add_k_proj", "add_v_proj"
        )
        yield _one(f"{theirs}.img_attn.proj", f"{block}.attn.to_out.0")
        yield _one(f"{theirs}.txt_attn.proj", f"{block}.attn.to_add_out")
        for side, suffix in (("img", ""), ("txt", "_context")):
            yield _one(f"{theirs}.{side}_mod.lin", f"{block}.norm1{suffix}.linear")
            yield _one(f"{theirs}.{side}_mlp.0", f"{block}.ff{suffix}.net.0.proj")
            yield _one(f"{theirs}.{side}_mlp.2", f"{block}.ff{suffix}.net.2")
    for i in range(config.num_single_layers):
        block, theirs = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield _qkv(f"{theirs}.linear1", block, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        yield _one(f"{theirs}.linear2", f"{block}.proj_out")
        yield _one(f"{theirs}.modulation.lin", f"{block}.norm.linear")
    yield _one("final_layer.linear", "proj_out")
    yield _one("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True)


def _lumina2(config: Any) -> Rows:
    counts = {
        "layers": config.num_layers,
        "noise_refiner": config.num_refiner_layers,
        "context_refiner": config.num_refiner_layers,
    }
    for group, count in counts.items():
        for i in range(count):
            block = f"{group}.{i}"
            yield _qkv(f"{block}.attention.qkv", f"{block}.attn", "to_q", "to_k", "to_v")
            yield _one(f"{block}.attention.out", f"{block}.attn.to_out.0")
            yield _one(f"{block}.adaLN_modulation.1", f"{block}.norm1.linear")
            for j in (1, 2, 3):
                yield _one(f"{block}.feed_forward.w{j}", f"{block}.feed_forward.linear_{j}")


def _wan(config: Any) -> Rows:
    for i in range(config.num_layers):
        block = f"blocks.{i}"
        for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for part, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                yield _one(f"{block}.{theirs}.{name}", f"{block}.{ours}.{part}")
        yield _one(f"{block}.cross_attn.k_img", f"{block}.attn2.add_k_proj")
        yield _one(f"{block}.cross_attn.v_img", f"{block}.attn2.add_v_proj")
        yield _one(f"{block}.ffn.0", f"{block}.ffn.net.0.proj")
        yield _one(f"{block}.ffn.2", f"{block}.ffn.net.2")


_Z_IMAGE = (
    (r"\battention\.to_out\.0$", "attention.out"),
    (r"\battention\.norm_([qk])$", r"attention.\1_norm"),
    (r"^all_(x_embedder|final_layer)\.\d+-\d+", r"\1"),
)


def _z_image(net: Any) -> Iterator[Place]:
    for name in _leaves(net):
        if name.endswith(".attention.to_q"):
            block = name.removesuffix("to_q")
            yield Place(f"{block}qkv", tuple(f"{block}to_{part}" for part in "qkv"))
        elif not name.endswith((".attention.to_k", ".attention.to_v")):
            original = name
            for ours, theirs in _Z_IMAGE:
                original = re.sub(ours, theirs, original)
            yield Place(original, (name,))


def _same(net: Any) -> Iterator[Place]:
    """Networks that keep their authors' names in Diffusers."""
    for name in _leaves(net):
        yield Place(name, (name,))


LAYOUTS: dict[str, Callable[[Any], Iterator[Place]]] = {
    "UNet2DConditionModel": _unet,
    "SD3Transformer2DModel": _table(_sd3),
    "FluxTransformer2DModel": _table(_flux),
    "Lumina2Transformer2DModel": _table(_lumina2),
    "WanTransformer3DModel": _table(_wan),
    "ZImageTransformer2DModel": _z_image,
    "QwenImageTransformer2DModel": _same,
}
