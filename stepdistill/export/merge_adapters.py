"""Merge LoRA files with weights into one file of the same kind.

cat      delta = sum_i w_i delta_i, exactly: ranks stand side by side, w_i and scales go into up.
linear   down = sum_i w_i down_i and up = sum_i w_i up_i with sum_i w_i = 1: the rank stays, but the
         product holds cross terms, so it is no sum of deltas. For checkpoints of one run.
"""

# Shapes: r rank, O rows (outputs), I columns (inputs), *K kernel (of convolutions).

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME as PEFT_CONFIG
from safetensors.torch import save_file
from torch import Tensor

from stepdistill.export.adapter_files import (
    METADATA,
    AdapterFile,
    adapter_config,
    module_of,
    read_adapters,
)
from stepdistill.export.lora_formats import Lora
from stepdistill.export.merge_pipelines import check_same
from stepdistill.export.pipeline import RECORD
from stepdistill.loading.teacher_lora import path_and_number
from stepdistill.reporting.markdown import code, plain
from stepdistill.storage.folders import refuse_foreign, replacing

METHODS = ("cat", "linear")


def merge_adapters(sources: Sequence[str], out_dir: str | Path, method: str = "cat") -> Path:
    """Write the weighted merge of LoRA files; returns the folder.

    Args: sources: `path[:weight]` of files or export folders of one format, weight 1 by default.
    Errors: ValueError for weights, formats, modules or students that do not fit together, before
        anything is written.
    """
    if method not in METHODS:
        raise ValueError(f"merge: expected a method of {METHODS}, got {method!r}.")
    if len(sources) < 2:
        raise ValueError(f"merge: expected two LoRA files or more, got {list(sources)}.")
    out_dir = Path(out_dir)
    refuse_foreign(out_dir, "merge")
    places, weights = zip(*(split_weight(text) for text in sources), strict=True)
    files = [read_adapters(Path(place)) for place in places]
    _check_alike(files)
    record = _record(files)
    merge = _cat if method == "cat" else _linear
    merged = merge([file.adapters for file in files], weights)
    listed = [{"file": str(f.path), "weight": w} for f, w in zip(files, weights, strict=True)]
    with replacing(out_dir, "merge") as aside:
        aside.mkdir()
        _write(files[0], merged, aside, out_dir.name)
        _write_record(aside, record, {"method": method, "of": listed}, out_dir.name)
    return out_dir


def split_weight(text: str) -> tuple[str, float]:
    """(path, weight) of `path[:weight]`. Errors: ValueError for a weight that is no number."""
    path, weight = path_and_number(text)
    if math.isnan(weight):
        raise ValueError(f"merge: expected path[:weight] with a finite weight, got {text!r}.")
    return path, weight


def _check_alike(files: Sequence[AdapterFile]) -> None:
    """Errors: ValueError where the files do not name modules the same way."""
    first = files[0]
    for other in files[1:]:
        same = first.sides == other.sides and first.tells_alpha == other.tells_alpha
        parts = [{module_of(s)[0] for s in file.adapters} for file in (first, other)]
        if not same or (first.tells_alpha == "metadata" and not parts[0] & parts[1]):
            raise ValueError(
                f"merge: expected files of one format and model, got {min(first.adapters)!r} in "
                f"{first.path} and {min(other.adapters)!r} in {other.path}. Export both alike."
            )
        for stem in first.adapters.keys() & other.adapters.keys():
            ours, theirs = first.adapters[stem], other.adapters[stem]
            shapes = [(x.up.shape[0], *x.down.shape[1:]) for x in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"merge: expected adapters of one model, got {stem} with weights of "
                    f"{shapes[0]} in {first.path} and {shapes[1]} in {other.path}."
                )


# -------------------------------------------------------------------- merging
Adapters = Mapping[str, Lora]


def _cat(files: Sequence[Adapters], weights: Sequence[float]) -> dict[str, Lora]:
    if not any(weights):
        raise ValueError(f"merge: expected a weight other than 0, got {list(weights)}.")
    out = {}
    for stem in dict.fromkeys(stem for file in files for stem in file):
        weighted = [(f[stem], w) for f, w in zip(files, weights, strict=True) if stem in f and w]
        if weighted:
            down = torch.cat([lora.down.float() for lora, _ in weighted], dim=0)
            up = torch.cat([w * lora.scale * lora.up.float() for lora, w in weighted], dim=1)
            out[stem] = Lora(down, up, float(down.shape[0]))
    return out


def _linear(files: Sequence[Adapters], weights: Sequence[float]) -> dict[str, Lora]:
    if abs(sum(weights) - 1.0) > 1e-6:
        raise ValueError(
            f"merge: expected weights that sum to 1 for method linear, got {list(weights)}. "
            "Use method cat for a sum of adapters."
        )
    facts = [{s: (x.down.shape[0], x.alpha) for s, x in file.items()} for file in files]
    if any(fact != facts[0] for fact in facts):
        raise ValueError(
            "merge: expected adapters of the same modules, rank and alpha for method linear, got "
            "different ones. Use method cat."
        )
    scales = torch.tensor(weights)

    def mean(stem: str, side: str) -> Tensor:
        stacked = torch.stack([getattr(file[stem], side).float() for file in files], dim=-1)
        return (stacked * scales).sum(-1)

    return {s: Lora(mean(s, "down"), mean(s, "up"), x.alpha) for s, x in files[0].items()}


# -------------------------------------------------------------------- writing
def _write(like: AdapterFile, merged: Adapters, out_dir: Path, name: str) -> None:
    """The merged adapters as a file of the same kind as `like`, of a merge called `name`."""
    tensors, metadata = {}, dict(like.metadata) or {"format": "pt"}
    for stem, lora in merged.items():
        tensors[stem + like.sides[0]] = lora.down.contiguous()
        tensors[stem + like.sides[1]] = lora.up.contiguous()
        if like.tells_alpha == "tensors":
            tensors[stem + like.alpha_key] = torch.tensor(lora.alpha)
    groups: dict[str, dict[str, Lora]] = {}
    for stem, lora in merged.items():
        component, module = module_of(stem)
        groups.setdefault(component, {})[module] = lora
    if like.tells_alpha == "peft":
        config = _widened(like.config[""], groups[""])
        (out_dir / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    elif like.tells_alpha == "metadata":
        configs = {
            f"{component}.{key}": value
            for component, adapters in groups.items()
            for key, value in _widened(like.config.get(component, {}), adapters).items()
        }
        metadata[METADATA] = json.dumps(configs, indent=2, sort_keys=True)
    else:
        metadata = {k: v for k, v in metadata.items() if not k.startswith("ss_network")}
    own_name = like.path.name if like.tells_alpha != "tensors" else f"{name}.safetensors"
    save_file(tensors, out_dir / own_name, metadata=metadata)


def _widened(base: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """The config of adapters that may stand on other modules than `base` names."""
    return {**adapter_config(base, adapters), "target_modules": sorted(adapters)}


def _record(files: Sequence[AdapterFile]) -> tuple[Path, dict[str, Any]] | None:
    """(folder, distillation.json) of the first student among the sources."""
    records = [
        (file.path.parent, json.loads((file.path.parent / RECORD).read_text()))
        for file in files
        if (file.path.parent / RECORD).is_file()
    ]
    for _, record in records[1:]:
        check_same([records[0][1], record])
    return records[0] if records else None


def _write_record(
    out_dir: Path,
    student: tuple[Path, dict[str, Any]] | None,
    merged: dict[str, Any],
    name: str,
) -> None:
    lines = "".join(
        f"- {code(entry['file'])} at weight {entry['weight']:g}\n" for entry in merged["of"]
    )
    card = f"# {plain(name)}\n\nLoRAs merged by method {merged['method']}:\n\n{lines}"
    record: dict[str, Any] = {"merged": merged}
    if student is not None:
        folder, record = student[0], {**student[1], "merged": merged}
        if (folder / "scheduler").is_dir():
            shutil.copytree(folder / "scheduler", out_dir / "scheduler", dirs_exist_ok=True)
        if (folder / "README.md").is_file():
            card += "\nThe student among them was described so:\n\n"
            card += (folder / "README.md").read_text().split("---\n", 2)[-1].lstrip()
    (out_dir / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    (out_dir / "README.md").write_text(card)
