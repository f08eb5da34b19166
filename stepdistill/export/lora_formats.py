"""LoRA files for other tools: kohya's keys (A1111, ComfyUI, sd-scripts) and ComfyUI's own.

    kohya     lora_unet_NAME.lora_down.weight, .lora_up.weight, .alpha (a scalar); dots of NAME are
              underscores. A loader adds alpha / rank * up @ down.
    comfyui   diffusion_model.NAME.lora_down.weight, .lora_up.weight.

The scale is inside up in every format and alpha is the rank: what loaders take a missing alpha
for, and some read none. NAME is the authors' (loading/original_layout.py), but Diffusers' own where
the tools want it: kohya of Stable Diffusion 1 and 2, comfyui of Z-Image. Where the authors hold
q, k and v in one matrix, three adapters of rank r become one of rank 3 r: down stacks theirs, up is
block diagonal, so nothing is lost.
"""

# Shapes: r rank, O rows (outputs), I columns (inputs), *K kernel (of convolutions).

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_FILE
from safetensors.torch import load_file
from torch import Tensor, nn

from stepdistill.families.family import Family
from stepdistill.loading.original_layout import (
    Place,
    original_layout,
    split,
    swap_halves,
)

LORA_FILE = "pytorch_lora_weights.safetensors"
Format = Literal["kohya", "comfyui"]
PREFIX: dict[str, str] = {"kohya": "lora_unet_", "comfyui": "diffusion_model."}
DTYPES = ("bfloat16", "float16", "float32")
# A1111 splits keys of an SD3 file at their last two dots and fails on NAME.alpha; sd-scripts takes
# any key with "alpha" in it for that of the module before the first dot, and fails where none is.
_SPLIT_ALPHA = ".lora.alpha"
TOLERANCE = 1e-5  # of the largest entry of a delta: float32 sums in another order
# (denoiser class, format) that Diffusers' load_lora_weights converts for any width and any choice
# of modules. Its Flux converter has the released width written in.
_DIFFUSERS_READS = {
    ("UNet2DConditionModel", "kohya"),
    *(
        (f"{name}Transformer2DModel", form)
        for name in ("ZImage", "QwenImage", "Flux")
        for form in PREFIX
    ),
}
_FLUX_WIDTH = 3072
_Z_IMAGE_BLOCK = re.compile(r"^(layers|\w+_refiner)\.\d+\.(attention|feed_forward)\.")


@dataclass(frozen=True)
class Lora:
    """down (r, I, *K), up (O, r, *1) of one module; it adds alpha / r * up @ down to the weight."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def scale(self) -> float:
        return self.alpha / self.down.shape[0]

    def delta(self) -> Tensor:
        """(O, I, *K) float32 that is added to the weight."""
        rows = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.scale * rows.reshape(self.up.shape[0], *self.down.shape[1:])


def adapters_of(net: nn.Module, role: str) -> dict[str, Lora]:
    """The adapters of that name on `net` by the stock name of their module, float32 on the CPU."""
    adapters = {}
    for name, layer in net.named_modules():
        if isinstance(layer, BaseTunerLayer) and role in layer.lora_A:
            down, up = (
                part[role].weight.detach().float().cpu().contiguous()
                for part in (layer.lora_A, layer.lora_B)
            )
            adapters[name] = Lora(down, up, float(layer.scaling[role]) * down.shape[0])
    return adapters


def folded(adapters: Mapping[str, Lora], dtype: torch.dtype) -> dict[str, Lora]:
    """The same in `dtype` with alpha = rank: the scale is in up."""
    return {
        name: Lora(lora.down.to(dtype), (lora.up * lora.scale).to(dtype), float(len(lora.down)))
        for name, lora in adapters.items()
    }


def _rows(net: Any) -> dict[str, int]:
    """Rows of each module's weight by stock name."""
    rows = {}
    for path, module in net.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and ".lora_" not in path:
            # A quantised weight is packed; its layer knows the size.
            linear = isinstance(module, nn.Linear)
            count = module.out_features if linear else weight.shape[0]
            rows[path.removesuffix(".base_layer")] = int(count)
    return rows


def places_of(net: Any, form: str) -> list[Place]:
    """Where the format's names of modules stand. Errors: see `original_layout`."""
    places, kind = original_layout(net), type(net).__name__
    sd = kind == "UNet2DConditionModel" and net.config.addition_embed_type != "text_time"
    if (sd and form == "kohya") or (kind == "ZImageTransformer2DModel" and form == "comfyui"):
        return [Place(part, (part,)) for place in places for part in place.parts]
    return places


def check_format(family: Family, form: str) -> None:
    """Errors: ValueError where other tools have no names for this network."""
    if form not in family.lora_formats:
        raise ValueError(
            f"export: expected format pipeline or lora for {family.name}, got {form!r}: no key "
            f"layout of {type(family.net).__name__} in other tools is known here. Load the lora "
            "with Diffusers or PEFT, or export the merged pipeline."
        )


# --------------------------------------------------------------------- writing
def to_original(
    adapters: Mapping[str, Lora], places: list[Place], rows: Mapping[str, int]
) -> dict[str, Lora]:
    """Adapters by original name, those of one fused matrix made one.

    Args: adapters: see `folded`. rows: of every module, also of those without an adapter.
    Errors: ValueError for an adapter of a module that the layout does not name.
    """
    out, left = {}, set(adapters)
    for place in places:
        there = {part: adapters[part] for part in place.parts if part in adapters}
        if there:
            out[place.name] = _fused(place, there, rows)
            left -= set(there)
    if left:
        raise ValueError(
            f"export: expected adapters of modules that the format names, got {sorted(left)[:3]}. "
            "Leave them out of tuning.target_modules, or export format lora."
        )
    return out


def _fused(place: Place, there: Mapping[str, Lora], rows: Mapping[str, int]) -> Lora:
    first = next(iter(there.values()))
    if len(place.parts) == 1:
        return Lora(first.down, swap_halves(first.up) if place.swapped else first.up, first.alpha)
    down = torch.cat([lora.down for lora in there.values()], dim=0)
    shape = (sum(rows[part] for part in place.parts), len(down), *down.shape[2:])
    up = torch.zeros(shape, dtype=down.dtype)
    row = column = 0
    for part in place.parts:
        if part in there:
            rank = len(there[part].down)
            up[row : row + rows[part], column : column + rank] = there[part].up
            column += rank
        row += rows[part]
    return Lora(down, swap_halves(up) if place.swapped else up, float(len(down)))


def tensors_of(adapters: Mapping[str, Lora], net: Any, form: str) -> dict[str, Tensor]:
    """What a file of the format holds. Args: adapters: by stock name, see `folded`."""
    sd3 = type(net).__name__ == "SD3Transformer2DModel"
    tensors, alpha_key = {}, _SPLIT_ALPHA if sd3 else ".alpha"
    for name, lora in to_original(adapters, places_of(net, form), _rows(net)).items():
        stem = _stem(name, form)
        tensors[f"{stem}.lora_down.weight"] = lora.down.contiguous()
        tensors[f"{stem}.lora_up.weight"] = lora.up.contiguous()
        if form == "kohya":
            tensors[stem + alpha_key] = torch.tensor(lora.alpha)
    return tensors


def alpha_key_of(tensors: Iterable[str]) -> str:
    """What stands behind a module's name in that of its alpha, by a file's keys."""
    return _SPLIT_ALPHA if any(name.endswith(_SPLIT_ALPHA) for name in tensors) else ".alpha"


def _stem(name: str, form: str) -> str:
    return PREFIX[form] + (name.replace(".", "_") if form == "kohya" else name)


# --------------------------------------------------------------------- reading
def read_format(path: Path, net: Any, form: str) -> dict[str, Tensor]:
    """Deltas (O, I, *K) by stock name, by the inverse of `to_original`.

    Errors: ValueError for keys that name no module of `net`.
    """
    tensors, rows = load_file(path), _rows(net)
    alpha_key = alpha_key_of(tensors)
    deltas: dict[str, Tensor] = {}
    for place in places_of(net, form):
        stem = _stem(place.name, form)
        if f"{stem}.lora_up.weight" in tensors:
            down, up = (tensors.pop(f"{stem}.lora_{side}.weight") for side in ("down", "up"))
            alpha = tensors.pop(stem + alpha_key, None)
            lora = Lora(down, up, float(down.shape[0] if alpha is None else alpha))
            deltas |= split(place, lora.delta(), rows)
    if tensors:
        raise ValueError(
            f"{path.name}: expected {form} keys of {type(net).__name__}, got {min(tensors)!r}."
        )
    return deltas


def _empty_net(family: Family) -> Any:
    """A network never filled: its memory is reserved and not touched, so it costs nothing."""
    net = family.first_net
    with init_empty_weights():
        empty = type(net).from_config(net.config)
    return empty.to_empty(device="cpu")


def read_with_diffusers(family: Family, path: Path, component: str = "") -> dict[str, Tensor]:
    """Deltas by stock name as load_lora_weights makes them, in that component where it is told."""
    empty, reader = _empty_net(family), copy.copy(family.pipeline)
    second = {} if component in ("", family.net_name) else {f"load_into_{component}": True}
    reader.register_modules(**{component or family.net_name: empty})
    named = {"weight_name": path.name, "adapter_name": "read"}
    reader.load_lora_weights(str(path.parent), **named, **second)
    return {name: lora.delta() for name, lora in adapters_of(empty, "read").items()}


def read_with_peft(family: Family, path: Path) -> dict[str, Tensor]:
    """Deltas by stock name as PEFT makes them of a folder."""
    empty = _empty_net(family)
    PeftModel.from_pretrained(empty, str(path.parent), adapter_name="read")
    return {name: lora.delta() for name, lora in adapters_of(empty, "read").items()}


def diffusers_reads(net: Any, form: str, modules: Iterable[str]) -> bool:
    """Whether Diffusers' own loader converts the format for these modules of this network."""
    kind = type(net).__name__
    if form == "lora":
        return True
    if kind == "ZImageTransformer2DModel" and form == "kohya":  # knows the blocks' names alone
        return all(_Z_IMAGE_BLOCK.search(name) for name in modules)
    if kind == "FluxTransformer2DModel":
        return bool(net.inner_dim == _FLUX_WIDTH)
    return (kind, form) in _DIFFUSERS_READS


def read_back(
    family: Family, path: Path, form: str, adapters: Mapping[str, Lora], component: str = ""
) -> dict[str, float]:
    """Largest relative difference of the file's deltas from the adapters, by reader.

    Args: component: where of the pipeline it is loaded; none means its denoiser.
    """
    read, net = {}, family.first_net
    if path.name == PEFT_FILE:
        read["peft"] = read_with_peft(family, path)
    elif diffusers_reads(net, form, adapters):
        read["diffusers"] = read_with_diffusers(family, path, component)
    if form in PREFIX:
        read["inverse"] = read_format(path, net, form)
    return {reader: _worst(deltas, adapters) for reader, deltas in read.items()}


def check_lora(
    family: Family, path: Path, form: str, adapters: Mapping[str, Lora], component: str = ""
) -> dict[str, float]:
    """What `read_back` finds. Errors: RuntimeError where one is above what float32 explains."""
    worst = read_back(family, path, form, adapters, component)
    if not all(value <= TOLERANCE for value in worst.values()):
        raise RuntimeError(
            f"export: expected {path.name} to hold the student's adapter, got relative differences "
            f"{worst} when read back."
        )
    return worst


def _worst(deltas: Mapping[str, Tensor], adapters: Mapping[str, Lora]) -> float:
    if not set(adapters) <= set(deltas):
        return float("inf")
    worst = 0.0
    for name, delta in deltas.items():
        wanted = adapters[name].delta() if name in adapters else torch.zeros_like(delta)
        size = float(wanted.abs().max()) or 1.0
        worst = max(worst, float((delta - wanted).abs().max()) / size)
    return worst
