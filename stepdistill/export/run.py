"""`stepdistill sample`: call an export as its distillation.json says, with Diffusers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from stepdistill.export.card import call_options
from stepdistill.export.multi_student import holds_students, load_students
from stepdistill.export.pipeline import RECORD
from stepdistill.loading.safe_files import load_stock
from stepdistill.loading.source import ModelSource
from stepdistill.reporting.sound import write_wav
from stepdistill.reporting.values import counted
from stepdistill.storage.files import read_json
from stepdistill.storage.folders import refuse_written_on

INDEX = "metadata.jsonl"


def sample_export(
    folder: str | Path,
    prompts: Sequence[str],
    output_dir: str | Path,
    num_steps: int | None = None,
    seed: int = 0,
) -> list[Path]:
    """One PNG (of videos GIF, of sound WAV) for each prompt, named by index; prompts stand in
    metadata.jsonl.

    Errors: ValueError where the folder is no export, for steps it was not exported for, or where
        output_dir holds files of these names that are no earlier samples.
    """
    file = Path(folder) / RECORD
    if not file.is_file():
        raise ValueError(f"sample: expected an exported pipeline with {RECORD}, got {folder}.")
    record = read_json(file, ("num_inference_steps", "load_without", "conditioning", "call"))
    if record.get("lora"):
        raise ValueError(
            f"sample: expected an exported pipeline, got {folder}, a LoRA. Load it on its base as "
            "its model card shows, or export its run as a pipeline: stepdistill export RUN_DIR OUT."
        )
    if record.get("reads"):
        raise ValueError(
            f"sample: expected a pipeline that a prompt is enough for, got {folder}, which reads "
            "an image too. Call it as its model card shows."
        )
    steps = record["num_inference_steps"]
    if num_steps not in (None, steps):
        raise ValueError(
            f"sample: expected {counted(steps, 'step')}, which this export is for, got "
            f"{num_steps}. Export again: stepdistill export RUN_DIR OUT --num_steps N."
        )
    out = Path(output_dir)
    _refuse_others_files(out, len(prompts))
    without = dict.fromkeys(record["load_without"])
    if holds_students(folder):
        pipe = load_students(folder, without)
    else:
        pipe = load_stock(folder, ModelSource.of(folder).index, **without)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with (out / INDEX).open("w", encoding="utf-8") as index:
        for i, prompt in enumerate(prompts):
            subject: dict[str, Any] = {"prompt": prompt}
            if record["conditioning"] != "prompt":
                labels = record["conditioning"] == "label"
                subject = {"class_labels": [int(prompt)]} if labels else {}
            result = pipe(
                **subject,
                **call_options(record),
                generator=torch.Generator().manual_seed(seed + i),
                output_type="pt" if record.get("output") == "audios" else "pil",
            )
            made = result[0][0]
            path = out / f"{i:04d}{_kind(made)}"
            row = {"file_name": path.name, "text": prompt, "seed": seed + i}
            index.write(json.dumps(row) + "\n")
            index.flush()  # before the file, which is ours by this line
            if isinstance(made, torch.Tensor):
                write_wav(path, made, pipe.vae.config.sampling_rate)
            else:
                _save(made, path)
            written.append(path)
    return written


def _refuse_others_files(out: Path, count: int) -> None:
    """Errors: ValueError where files would be written on that this command has not made."""
    index, ours = out / INDEX, set[str]()
    with suppress(OSError, ValueError, KeyError, TypeError):
        rows = [json.loads(line) for line in index.read_text(encoding="utf-8").splitlines()]
        if all(set(row) == {"file_name", "text", "seed"} for row in rows):
            ours = {INDEX, *(str(row["file_name"]) for row in rows)}
    names = (f"{i:04d}{kind}" for i in range(count) for kind in (".png", ".gif", ".wav"))
    refuse_written_on(out, (name for name in (INDEX, *names) if name not in ours), "output_dir")


def _kind(made: Any) -> str:
    if isinstance(made, torch.Tensor):
        return ".wav"
    return ".gif" if isinstance(made, list) else ".png"


def _save(made: Any, path: Path) -> None:
    """Write one PIL image, or a video's list of them at 16 frames a second."""
    if isinstance(made, list):
        made[0].save(path, save_all=True, append_images=made[1:], duration=1000 / 16, loop=0)
    else:
        made.save(path)
