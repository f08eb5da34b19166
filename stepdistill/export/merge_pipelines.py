"""Merge two exported students: theta = weight * a + (1 - weight) * b, tensor by tensor.

SwiftBrush v2 averages a fully trained student with a LoRA-trained one this way.
Source: Dao et al. 2024, arXiv:2408.14176; weight 0.5 there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.export.lora_formats import LORA_FILE, PEFT_FILE
from stepdistill.export.pipeline import RECORD
from stepdistill.storage.folders import refuse_foreign, replacing

# What two students must share to be sampled as one.
_SAME = ("base_model", "family", "kind", "heun", "times", "guidance_scale", "guidance_embedded")

_EARLIER = {"heun": False}  # what records without the key mean


def merge_pipelines(a: str | Path, b: str | Path, out_dir: str | Path, weight: float = 0.5) -> Path:
    """Write the weighted mean of two pipeline exports of one teacher; returns the folder.

    Args: weight: share of `a` in [0, 1]; 1 copies a's weights bit for bit, 0 copies b's.
    Errors: ValueError for LoRA files, students sampled differently, or weights of other names or
        shapes, before anything is written.
    Notes: shards, config files and the card are a's; means are taken in float32 or better.
    """
    a, b, out_dir = Path(a), Path(b), Path(out_dir)
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"merge: expected a weight in [0, 1], got {weight}.")
    refuse_foreign(out_dir, "merge")
    records = _records(a, b)
    owners = [_owners(folder) for folder in (a, b)]
    _check_shapes(*owners)
    merged_from = {"a": str(a), "b": str(b), "weight": weight, "run_b": records[1].get("run")}
    record = {**records[0], "merged": merged_from}
    with replacing(out_dir, "merge") as aside:
        shutil.copytree(a, aside, ignore=shutil.ignore_patterns("*.safetensors"))
        for path in sorted(a.rglob("*.safetensors")):
            place = path.relative_to(a)
            merged = {
                name: _mean(x, _read(owners[1][_key(place, name)], name), weight)
                for name, x in _tensors(path)
            }
            save_file(merged, aside / place, metadata={"format": "pt"})
        (aside / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return out_dir


def _mean(x: Tensor, y: Tensor, weight: float) -> Tensor:
    if torch.equal(x, y) or not x.is_floating_point():
        return x  # frozen parts stay as they are, bit for bit
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Not lerp: both ends are exact this way.
    return (weight * x.to(wide) + (1.0 - weight) * y.to(wide)).to(x.dtype)


# -------------------------------------------------------------------- reading
def _records(a: Path, b: Path) -> list[dict[str, Any]]:
    """Both distillation.json. Errors: ValueError where they do not fit together."""
    records = []
    for folder in (a, b):
        lora = any((folder / name).is_file() for name in (LORA_FILE, PEFT_FILE))
        if lora or not (folder / RECORD).is_file():
            what = "a LoRA file" if lora else "none"
            raise ValueError(
                f"merge: expected a pipeline export in {folder}, got {what}. "
                "Merge LoRA files with each other, or export the student with format pipeline."
            )
        records.append(json.loads((folder / RECORD).read_text()))
    check_same(records)
    return records


def check_same(records: Sequence[Mapping[str, Any]]) -> None:
    """Errors: ValueError where students cannot be sampled as one."""
    differ = {k: tuple(r.get(k, _EARLIER.get(k)) for r in records) for k in _SAME}
    differ = {k: pair for k, pair in differ.items() if pair[0] != pair[1]}
    if differ:
        raise ValueError(
            f"merge: expected two students of one teacher, sampled alike, got {differ}. "
            "Train or export both for the same steps."
        )


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            yield name, file.get_tensor(name)


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _key(place: Path, name: str) -> tuple[str, str]:
    """(component folder, tensor name): the same whatever the sharding."""
    return str(place.parent), name


def _owners(folder: Path) -> dict[tuple[str, str], Path]:
    """Which file holds which tensor."""
    owners = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            owners.update({_key(path.relative_to(folder), n): path for n in file.keys()})  # noqa: SIM118
    return owners


def _check_shapes(a: dict[tuple[str, str], Path], b: dict[tuple[str, str], Path]) -> None:
    """Errors: ValueError where names or shapes differ."""
    if not a or a.keys() != b.keys():
        raise ValueError(
            "merge: expected the same weights in both folders, got only one with "
            f"{sorted(a.keys() ^ b.keys())[:3]}."
        )
    for key, path in a.items():
        shapes = []
        for file in (path, b[key]):
            with safe_open(file, framework="pt") as handle:
                shapes.append(tuple(handle.get_slice(key[1]).get_shape()))
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"merge: expected equal shapes of {'/'.join(key)}, got {shapes[0]} and {shapes[1]}."
            )
