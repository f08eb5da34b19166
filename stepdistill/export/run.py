"""`stepdistill sample`: call an export as its distillation.json says, with Diffusers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from stepdistill.export.card import call_options
from stepdistill.export.pipeline import RECORD
from stepdistill.loading.safe_files import load_stock
from stepdistill.loading.source import ModelSource
from stepdistill.storage.files import read_json


def sample_export(
    folder: str | Path,
    prompts: Sequence[str],
    output_dir: str | Path,
    num_steps: int | None = None,
    seed: int = 0,
) -> list[Path]:
    """One PNG (of videos, GIF) for each prompt, named by index; prompts stand in metadata.jsonl.

    Errors: ValueError where the folder is no export, or for steps it was not exported for.
    """
    file = Path(folder) / RECORD
    if not file.is_file():
        raise ValueError(f"sample: expected an exported pipeline with {RECORD}, got {folder}.")
    record = read_json(file, ("num_inference_steps", "load_without", "conditioning", "call"))
    if record.get("reads_image"):
        raise ValueError(
            f"sample: expected a pipeline that a prompt is enough for, got {folder}, which reads a "
            "first frame too. Call it as its model card shows."
        )
    steps = record["num_inference_steps"]
    if num_steps not in (None, steps):
        raise ValueError(
            f"sample: expected {steps} steps, which this export is for, got {num_steps}. "
            "Export again: stepdistill export RUN_DIR OUT --num_steps N."
        )
    without = dict.fromkeys(record["load_without"])
    pipe = load_stock(folder, ModelSource.of(folder).index, **without)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(output_dir)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with (out / "metadata.jsonl").open("w") as index:
        for i, prompt in enumerate(prompts):
            subject: dict[str, Any] = {"prompt": prompt}
            if record["conditioning"] != "prompt":
                labels = record["conditioning"] == "label"
                subject = {"class_labels": [int(prompt)]} if labels else {}
            result = pipe(
                **subject,
                **call_options(record),
                generator=torch.Generator().manual_seed(seed + i),
                output_type="pil",
            )
            path = _save(result[0][0], out / f"{i:04d}")
            index.write(
                json.dumps({"file_name": path.name, "text": prompt, "seed": seed + i}) + "\n"
            )
            written.append(path)
    return written


def _save(made: Any, stem: Path) -> Path:
    """Write one PIL image, or a video's list of them at 16 frames a second."""
    if not isinstance(made, list):
        path = stem.with_suffix(".png")
        made.save(path)
        return path
    path = stem.with_suffix(".gif")
    made[0].save(path, save_all=True, append_images=made[1:], duration=1000 / 16, loop=0)
    return path
