"""The emoji teacher as a folder: made from the source packages, and as it is shipped."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from stepdistill.export.secrets import published_json
from stepdistill.storage.checkpoints import newest_valid
from stepdistill.storage.files import read_json, write_atomic, write_text
from stepdistill.storage.folders import replacing

from .budget import Budget
from .captions import caption
from .data import (
    ENTRIES,
    HELD_OUT_FILE,
    LICENCES,
    SHIPPED,
    Emoji,
    build_data,
    load_data,
    read_entries,
)
from .judge import JUDGE_FILE, Retrieval, train_retrieval
from .ladder import measure
from .model import build_pipeline
from .nearest import save_beside_nearest
from .training import train

PICTURES, MEASURED, MADE = "pictures.zip", "measured.json", "made.json"
BESIDE_NEAREST = "held_out.png"
_WEBP_QUALITY = 70
_ABOUT = """# Emoji: a small text-to-image teacher

StableDiffusionPipeline, 64 px, v prediction, zero terminal SNR. Trained on Microsoft's Fluent
emoji (MIT) and Noto emoji (Apache 2.0), with the names, groups and skin tones of emoji-datasource
(MIT). The licences in full, and what the packages say of theirs, are in licences/; the combinations
in held_out.json were never seen.
"""


def emoji_teacher(folder: Path = SHIPPED) -> StableDiffusionPipeline:
    """The shipped teacher, or the one in `folder`, in float32. Errors: see `refuse_missing`."""
    refuse_missing(folder)
    pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(
        str(folder), dtype=torch.float32, local_files_only=True
    )
    return pipeline


def refuse_missing(folder: Path) -> None:
    """Errors: FileNotFoundError where `folder` holds no teacher."""
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{folder}: expected the emoji teacher, got no model_index.json. Make it: stepdistill "
            "demo teacher --source PACKAGES --output_dir DIR."
        )


def make_teacher(
    source: Path, output_dir: Path, seconds: float, budget: Budget | None = None
) -> Path | None:
    """Train the teacher of the packages in `source`, from where an earlier call stopped.

    Returns: OUTPUT_DIR/teacher once it is done, beside a picture of held-out combinations; None
    where `seconds` were up before.
    """
    budget = budget or Budget()
    if not (output_dir / "data").exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        build_data(source, output_dir / "data", budget.seed)
    emoji = load_data(output_dir / "data")
    pipeline = build_pipeline(emoji.entries, budget.seed)
    if not train(pipeline, emoji, output_dir, budget, seconds):
        return None
    judge = output_dir / JUDGE_FILE.name
    if not judge.exists():
        write_atomic(judge, train_retrieval(emoji, seed=budget.seed).save)
    net, measured = Retrieval.load(judge), output_dir / MEASURED
    if not measured.exists():
        write_text(measured, json.dumps(measure(pipeline, emoji, net), indent=2) + "\n")
    save_beside_nearest(output_dir / BESIDE_NEAREST, pipeline, emoji, net)
    write_teacher(pipeline, emoji, output_dir, budget)
    return output_dir / "teacher"


def write_teacher(
    pipeline: StableDiffusionPipeline, emoji: Emoji, output_dir: Path, budget: Budget
) -> None:
    """OUTPUT_DIR/teacher: the pipeline in bf16, the pictures, the licences and the card."""
    spent = {
        phase: read_json(newest / "state.json", ["cpu_seconds", "pictures"])
        for phase in ("autoencoder", "denoiser", "decoder")
        if (newest := newest_valid(output_dir / phase)[0]) is not None
    }
    with replacing(output_dir / "teacher") as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)
        half = StableDiffusionPipeline.from_pretrained(str(partial), dtype=torch.bfloat16)
        half.save_pretrained(partial, safe_serialization=True)
        for file in partial.rglob("*.json"):  # each part notes the folder it was loaded from
            file.write_bytes(published_json(file))
        write_pictures(emoji, partial / PICTURES)
        for folder in (output_dir / "data" / "licences", LICENCES):
            shutil.copytree(folder, partial / "licences", dirs_exist_ok=True)
        for file in (HELD_OUT_FILE, output_dir / JUDGE_FILE.name, output_dir / MEASURED):
            shutil.copy(file, partial / file.name)
        took = {"budget": asdict(budget), "spent": spent}
        (partial / MADE).write_text(json.dumps(took, indent=2) + "\n")
        (partial / "README.md").write_text(_card(spent, read_json(output_dir / MEASURED)))


def write_pictures(emoji: Emoji, path: Path, count: int = 2_000, seed: int = 0) -> None:
    """`count` pictures that training saw, drawn as often as it drew them, as WebP with their
    captions: a zip of the folder that `--data.train_data_dir` reads."""
    weights = emoji.weights()
    count = min(count, int((weights > 0).sum()))
    generator = torch.Generator().manual_seed(seed)
    index = torch.multinomial(weights, count, generator=generator).sort().values.tolist()
    lines = []
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for k in index:
            buffer, name = io.BytesIO(), f"{k:05d}.webp"
            image = Image.fromarray(emoji.pictures[0, k])
            image.save(buffer, "WEBP", quality=_WEBP_QUALITY, method=6)
            archive.writestr(name, buffer.getvalue())
            lines.append(json.dumps({"file_name": name, "text": caption(emoji.entries[k])}))
        facts = [json.dumps(asdict(emoji.entries[k])) for k in index]
        for name, rows in (("metadata.jsonl", lines), (ENTRIES, facts)):
            archive.writestr(name, "\n".join(rows) + "\n", zipfile.ZIP_DEFLATED)


def load_pictures(folder: Path) -> Emoji:
    """The pictures that `write_pictures` put into a teacher's folder, in one variant."""
    with zipfile.ZipFile(folder / PICTURES) as archive:
        entries = read_entries(archive.read(ENTRIES).decode())
        names = sorted(name for name in archive.namelist() if name.endswith(".webp"))
        pictures = [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]
    return Emoji(np.stack(pictures)[None], entries)


def _card(spent: dict[str, dict[str, float]], measured: dict[str, Any]) -> str:
    rows = [
        f"| {phase} | {took['pictures']:,} | {took['cpu_seconds'] / 3600:.1f} |"
        for phase, took in spent.items()
    ]
    ladder = [
        f"| {r['steps']} | {r['guidance']:g} | {r['frechet']:.2f} | {r['ratio']:.1f} x | "
        f"{r['recall']:.2f} |"
        for r in measured["ladder"]
    ]
    obeyed = measured["obeyed"]
    return "\n".join(
        [
            _ABOUT,
            "| phase | pictures seen | core-hours |",
            "| --- | ---: | ---: |",
            *rows,
            "",
            "Wide captions, by Frechet distance in the judge's features (real pictures: "
            f"{measured['floor']:.2f}) and recall:",
            "",
            "| steps | guidance | Frechet distance | of most steps | recall |",
            "| ---: | ---: | ---: | ---: | ---: |",
            *ladder,
            "",
            "Narrow captions, right caption first among 20: "
            f"{obeyed['seen']:.0%} of seen combinations, {obeyed['held_out']:.0%} of held-out ones "
            f"(real pictures {measured['real']:.0%}).",
            "",
        ]
    )
