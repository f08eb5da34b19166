"""Read LoRA files of every tool: adapters by the stem of their keys, with the alpha they mean."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME as PEFT_CONFIG
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from stepdistill.export.lora_formats import LORA_FILE, PEFT_FILE, Lora, alpha_key_of

METADATA = "lora_adapter_metadata"
_SIDES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
)


@dataclass
class AdapterFile:
    """One LoRA file: adapters by the stem of their keys, and how the file tells their alpha.

    config: LoRA config by component prefix ("" in PEFT's folder), empty where the file has none.
    alpha_key: what stands behind a stem in the name of its alpha.
    """

    path: Path
    sides: tuple[str, str]
    adapters: dict[str, Lora]
    config: dict[str, dict[str, Any]]
    metadata: dict[str, str] = field(default_factory=dict)
    alpha_key: str = ".alpha"

    @property
    def tells_alpha(self) -> str:
        """ "peft", "metadata" or "tensors"."""
        if self.path.name == PEFT_FILE:
            return "peft"
        return "metadata" if self.sides[0] != ".lora_down.weight" else "tensors"


def read_adapters(place: Path) -> AdapterFile:
    """The LoRA file at `place`, a file or a folder that holds one.

    Errors: ValueError for no such file, a broken one, or keys that are no plain LoRA's.
    """
    path = _file_at(place)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except SafetensorError as err:
        raise ValueError(f"merge: expected a whole safetensors file, got {path}: {err}.") from err
    config = _configs(path, metadata)
    sides = next((s for s in _SIDES if any(n.endswith(s[0]) for n in tensors)), None)
    if sides is None:
        raise ValueError(f"merge: expected LoRA keys in {path}, got {sorted(tensors)[:2]}.")
    adapters, alpha_key = {}, alpha_key_of(tensors)
    for stem in [n.removesuffix(sides[0]) for n in tensors if n.endswith(sides[0])]:
        down, up = tensors.pop(stem + sides[0]), tensors.pop(stem + sides[1], None)
        alpha = tensors.pop(stem + alpha_key, None)
        if up is None:
            raise ValueError(f"merge: expected both factors of {stem} in {path}, got one.")
        lora_alpha = _alpha(stem, down.shape[0], config) if alpha is None else float(alpha)
        adapters[stem] = Lora(down, up, lora_alpha)
    if tensors:
        raise ValueError(
            f"merge: expected a plain LoRA in {path}, got {sorted(tensors)[:2]} beside it."
        )
    return AdapterFile(path, sides, adapters, config, metadata, alpha_key)


def _file_at(place: Path) -> Path:
    if place.is_dir():
        for name in (LORA_FILE, PEFT_FILE):
            if (place / name).is_file():
                return place / name
        files = sorted(place.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        raise ValueError(f"merge: expected one LoRA file in {place}, got {len(files)}.")
    if not place.is_file() or place.suffix != ".safetensors":
        raise ValueError(f"merge: expected a .safetensors file or its folder, got {place}.")
    return place


def _configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """LoRA config by component, of Diffusers' metadata or PEFT's adapter_config.json."""
    if path.name == PEFT_FILE:
        return {"": json.loads((path.parent / PEFT_CONFIG).read_text())}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in json.loads(metadata.get(METADATA, "{}")).items():
        prefix, _, name = key.partition(".")
        configs.setdefault(prefix, {})[name] = value
    return configs


def module_of(stem: str) -> tuple[str, str]:
    """(component, module) of a stem; PEFT's folder has no component."""
    if stem.startswith("base_model.model."):
        return "", stem.removeprefix("base_model.model.")
    component, _, module = stem.partition(".")
    return component, module


def _alpha(stem: str, rank: int, configs: Mapping[str, dict[str, Any]]) -> float:
    """alpha of a module from its config; the rank where there is none, as loaders take it."""
    component, module = module_of(stem)
    config = configs.get(component)
    if not config:
        return float(rank)
    pattern = config.get("alpha_pattern") or {}
    alpha = float(pattern.get(get_pattern_key(pattern, module), config["lora_alpha"]))
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def adapter_config(base: Mapping[str, Any], adapters: Mapping[str, Lora]) -> dict[str, Any]:
    """`base` with the rank and alpha of each module; the commonest ones are the default's."""
    ranks = {module: lora.down.shape[0] for module, lora in adapters.items()}
    alphas = {module: lora.alpha for module, lora in adapters.items()}
    rank, alpha = max(ranks.values()), max(alphas.values())
    return {
        **base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "use_rslora": False,
    }
