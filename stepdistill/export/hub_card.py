"""The card of a published export: its own card, addressed to the repository, with Hub metadata.

Metadata (base, licence, tags, metrics), a sample grid, a table of metrics and the provenance are
added to what the export's README says; its code is made to load the repository.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stepdistill.export.base_model import BaseModel, base_model
from stepdistill.export.card import changed_data, data_text, students_text
from stepdistill.reporting.markdown import code, plain

SAMPLES = "samples.png"  # a grid that training wrote beside the export
METRICS = "metrics.json"  # {"dataset": name, "metrics": {name: number}}
_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_TASKS = {"prompt": "text-to-image", "label": "unconditional-image-generation"}


def published_card(folder: Path, record: Mapping[str, Any], repo_id: str) -> str:
    """README.md of `folder` as repository `repo_id`.

    Errors: ValueError for a metrics.json of another form.
    """
    base = base_model(record.get("base_model"), record["run"].get("revision"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    body = _HEADER.sub("", text).strip()
    body = body.replace(f"# {plain(folder.name)}\n", f"# {repo_id.split('/')[-1]}\n", 1)
    body = re.sub(
        r"^```python\n.*?^```", lambda m: m[0].replace(repr(folder.name), repr(repo_id)), body,
        flags=re.DOTALL | re.MULTILINE,
    )  # fmt: skip
    parts = [body]
    if (folder / SAMPLES).is_file():
        parts.append(f"![samples](./{SAMPLES})")
    dataset, metrics = read_metrics(folder / METRICS)
    if metrics:
        rows = "".join(f"| {plain(name)} | {value:g} |\n" for name, value in metrics.items())
        parts.append(
            f"## Metrics\n\nOn {plain(dataset)}.\n\n| metric | value |\n|---|---|\n{rows}".strip()
        )
    parts.append("## Provenance\n\n" + _provenance(record, base))
    data = _metadata(record, base, repo_id, dataset, metrics, "lora" in record)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def read_metrics(file: Path) -> tuple[str, dict[str, float]]:
    """(dataset, {metric: value}) of a metrics.json; nothing where there is none.

    Errors: ValueError for a file of another form.
    """
    if not file.is_file():
        return "", {}
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        dataset, metrics = read["dataset"], read["metrics"]
        values = {str(name): float(value) for name, value in metrics.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(
            f'{file}: expected {{"dataset": name, "metrics": {{name: number}}}}, got {err!r}.'
        ) from err
    return str(dataset), values


def _metadata(
    record: Mapping[str, Any],
    base: BaseModel,
    repo_id: str,
    dataset: str,
    metrics: Mapping[str, float],
    lora: bool,
) -> ModelCardData:
    task = _TASKS.get(record["conditioning"], "unconditional-image-generation")
    results = [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    tags = ["diffusers", "stepdistill", "few-step", "distillation", str(record["method"])]
    return ModelCardData(
        base_model=base.hub_id,
        library_name="diffusers",
        pipeline_tag=task,
        tags=[*tags, *(["lora"] if lora else [])],
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
        license=base.licence.get("license"),
        license_name=base.licence.get("license_name"),
        license_link=base.licence.get("license_link"),
    )


def _provenance(record: Mapping[str, Any], base: BaseModel) -> str:
    run = record["run"]
    data = run.get("data") or {}
    decay = run.get("train_config", {}).get("ema_decay", 0.0)
    scale = record["guidance_scale"]
    seconds = run.get("seconds")
    name = base.hub_id or Path(str(record.get("base_model") or "?")).name  # no machine's paths
    rows = {
        "base": code(name) + ("" if base.hub_id else ", a folder that is not on the Hub"),
        "base revision": f"commit {code(base.commit)}" if base.commit else None,
        "base weights": f"sha256 `{base.sha256}`, when published" if base.sha256 else None,
        "licence of the base": plain(base.licence.get("license", "not stated in its files")),
        "method": plain(record["method"]),
        "steps": record["num_inference_steps"],
        "guidance": "none" if scale is None else f"{scale:g}",
        "weights": f"averaged over training (EMA, decay {decay:g})" if decay else "last",
        "student updates": run.get("step", "unknown"),
        "students": students_text(record),
        "training data": data_text(data) or "not recorded",
        "data changed": changed_data(run),
        "real images of the GAN": data_text(data.get("gan")),
        "seed": run.get("seed", "unknown"),
        "wall time": "unknown" if seconds is None else f"{seconds:g} s",
        "settings": f"sha256 `{record['run_sha256']}`",
        "versions": ", ".join(f"{k} {v}" for k, v in record["versions"].items()),
    }
    lines = "".join(f"| {key} | {value} |\n" for key, value in rows.items() if value is not None)
    return f"| | |\n|---|---|\n{lines}".strip()
