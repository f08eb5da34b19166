"""Teachers that are a base plus LoRAs: which files `path[:scale]` says, and what they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from peft.utils import CONFIG_NAME as PEFT_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as PEFT_FILE

from stepdistill.core.options import finite
from stepdistill.loading.identity import commit_of
from stepdistill.loading.place import absolute, check_lora
from stepdistill.storage.files import sha256_of


@dataclass(frozen=True)
class LoraSource:
    """One LoRA: a local folder or a Hub id, the file in it (None: PEFT's folder), its scale."""

    place: str
    weight_name: str | None
    scale: float

    @property
    def path(self) -> Path:
        """The weight file's name where it lies, here or on the Hub; PEFT's folder."""
        return Path(self.place) / (self.weight_name or "")

    @property
    def file(self) -> Path | None:
        """The local weight file; None for a Hub id or a PEFT folder."""
        folder = Path(self.place)
        local = self.weight_name is not None and folder.is_dir()
        return folder / str(self.weight_name) if local else None


def parse_lora(text: str) -> LoraSource:
    """The LoraSource of `path[:scale]`: a .safetensors file, a folder with one, or a Hub id.

    A Hub id may name its file: user/name/style.safetensors. The scale is 1 where none is given.
    Errors: ValueError for a scale that is no finite number or is zero, a path that is not there,
        a pickled file, or a folder with no or several LoRA files.
    """
    path, scale = _split_scale(text)
    there = Path(absolute(path))
    if there.is_file():
        if there.suffix != ".safetensors":
            raise ValueError(
                f"teacher_lora: expected a .safetensors file, got {there}. Pickled weights are "
                "not read; convert them with safetensors."
            )
        return LoraSource(str(there.parent), there.name, scale)
    if there.is_dir():
        return LoraSource(str(there), _file_in(there), scale)
    check_lora("teacher_lora", path)
    user, name, *file = path.split("/", 2)
    return LoraSource(f"{user}/{name}", file[0] if file else LORA_WEIGHT_NAME_SAFE, scale)


def path_and_number(text: str) -> tuple[str, float]:
    """(path, number) of path[:number], 1 where it says none; nan where that is no finite number."""
    path, colon, tail = text.rpartition(":")
    if not colon or "/" in tail or "\\" in tail or Path(text).exists():
        path, tail = text, "1"
    return path, finite(tail)


def _split_scale(text: str) -> tuple[str, float]:
    path, scale = path_and_number(text)
    if not path or math.isnan(scale) or scale == 0.0:
        raise ValueError(
            f"teacher_lora: expected path[:scale] with a finite scale other than 0, got {text!r}."
        )
    return path, scale


def _file_in(folder: Path) -> str | None:
    """The LoRA file of a folder; None where PEFT reads the folder itself."""
    if (folder / PEFT_CONFIG).is_file():
        if not (folder / PEFT_FILE).is_file():  # PEFT would unpickle an adapter_model.bin
            raise ValueError(
                f"teacher_lora: expected {PEFT_FILE} in {folder}, got none. Pickled weights are "
                "not read; convert them with safetensors."
            )
        return None
    names = sorted(p.name for p in folder.glob("*.safetensors"))
    if LORA_WEIGHT_NAME_SAFE in names:
        return LORA_WEIGHT_NAME_SAFE
    if len(names) != 1:
        raise ValueError(
            f"teacher_lora: expected one .safetensors file in {folder}, got {names or 'none'}. "
            "Name the file itself."
        )
    return names[0]


def lora_facts(texts: Sequence[str]) -> list[dict[str, Any]]:
    """What identifies each LoRA: source, scale, and the hash of local files or the Hub's commit."""
    facts = []
    for text in texts:
        lora = parse_lora(text)
        fact: dict[str, Any] = {
            "source": lora.place,
            "weight_name": lora.weight_name,
            "scale": lora.scale,
        }
        folder = Path(lora.place)
        if folder.is_dir():
            names = [lora.weight_name] if lora.weight_name else [PEFT_CONFIG, PEFT_FILE]
            fact["sha256"] = sha256_of(*(folder / name for name in names))
        elif commit := commit_of(lora.place, None):
            fact["commit"] = commit
        facts.append(fact)
    return facts


def same_lora(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two of `lora_facts` are one LoRA at one scale, wherever its files lie."""
    for key in ("sha256", "commit"):
        if key in was and key in now:
            return bool(was[key] == now[key] and was["scale"] == now["scale"])
    places = [(absolute(f["source"]), f.get("weight_name"), f["scale"]) for f in (was, now)]
    return places[0] == places[1]


def lora_text(fact: Mapping[str, Any]) -> str:
    """`path:scale` of one of `lora_facts`: `parse_lora` undone."""
    source, name = fact["source"], fact.get("weight_name")
    return f"{source}/{name}:{fact['scale']!r}" if name else f"{source}:{fact['scale']!r}"
