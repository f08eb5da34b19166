"""A folder, teacher, method or prompt with a hostile name breaks no card, page or picture."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparison.test_report import row as compared_row
from demo.test_report import row as demo_row
from markdown_it import MarkdownIt

from stepdistill.comparison.report import write as write_comparison
from stepdistill.demo.report import Report as DemoReport
from stepdistill.evaluation.metrics import Number, System
from stepdistill.evaluation.report import Report as Evaluation
from stepdistill.export.card import write_card
from stepdistill.export.hub_card import published_card
from stepdistill.export.lora_card import lora_code, write_lora_card
from stepdistill.export.merge_adapters import _write_record
from stepdistill.monitoring.records import read_run
from stepdistill.monitoring.run_report import render
from stepdistill.reporting.values import Measured

NAME = "x` | <script>alert(1)</script> $a$ ```\n# head\n---\nlicense: mine"
SHOWN = " ".join(NAME.split())
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")
RECORD: dict[str, Any] = {
    "base_model": NAME,
    "method": NAME,
    "num_inference_steps": 2,
    "guidance_scale": None,
    "guidance_embedded": False,
    "guided": False,
    "call": {},
    "load_without": [],
    "conditioning": "prompt",
    "kind": "ode",
    "times": [1.0, 0.5],
    "trained_times": None,
    "visited_model_times": [999.0, 499.0],
    "lora": {
        "format": "lora",
        "file": f"{SHOWN}.safetensors",
        "dtype": "bfloat16",
        "readers": ["ComfyUI"],
    },
    "tools": {"why": "No tool samples it."},
    "run_sha256": "0",
    "versions": {"torch": "2"},
    "run": {
        "seed": 0,
        "step": 1,
        "model": NAME,
        "teacher_lora": [{"source": NAME, "weight_name": NAME, "scale": 1.0}],
        "data": {"source": NAME, "items": 3, "sha256": None},
    },
}


def unharmed(text: str, headings: list[str], name: str = SHOWN) -> None:
    """One document: its metadata, its headings and no markup of the name's."""
    parts = re.fullmatch(r"(?:---\n(.*?)\n---\n)?(.*)", text, re.DOTALL)
    assert parts is not None
    if parts[1]:
        meta = yaml.safe_load(parts[1])
        assert meta.get("license") != "mine"
        assert meta.get("base_model") in (None, NAME)
    tokens = PARSER.parse(parts[2])
    found = [b.content for a, b in pairwise(tokens) if a.type == "heading_open"]
    assert len(found) == len(headings)
    html = PARSER.render(parts[2])
    outside = re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    assert "<script" not in outside
    assert "alert(1)" in html
    rows = [row.count("<td") for row in html.split("<tr>") if "<td" in row]
    assert set(rows) <= {2}
    assert tokens[-1].type in ("paragraph_close", "table_close", "fence", "bullet_list_close")


def test_a_pipelines_card(tmp_path) -> None:
    write_card(tmp_path, RECORD, "StableDiffusionPipeline", NAME)
    unharmed((tmp_path / "README.md").read_text(), [SHOWN])


@pytest.mark.parametrize("form", ["lora", "kohya"])
def test_a_loras_card(tmp_path, form) -> None:
    record = {**RECORD, "lora": {**RECORD["lora"], "format": form}}
    text = lora_code(record, "StableDiffusionPipeline", "LCMScheduler", NAME)
    write_lora_card(tmp_path, record, text, NAME)
    unharmed((tmp_path / "README.md").read_text(), [SHOWN])


def test_a_merges_card(tmp_path) -> None:
    merged = {"method": "cat", "of": [{"file": NAME, "weight": 1.0}]}
    _write_record(tmp_path, None, merged, NAME)
    unharmed((tmp_path / "README.md").read_text(), [SHOWN])


def test_a_published_card_is_named_by_the_repository(tmp_path) -> None:
    folder = tmp_path / "x` | <script>alert(1)<"
    folder.mkdir()
    write_card(folder, RECORD, "StableDiffusionPipeline", folder.name)
    metrics = {"dataset": NAME, "metrics": {NAME: 1.0}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    base = tmp_path / NAME[:9]
    base.mkdir()
    text = published_card(folder, {**RECORD, "base_model": str(base)}, "me/name")
    unharmed(text, ["name", "Metrics", "Provenance"])
    assert "\n# name\n" in text
    assert "from_pretrained('me/name'" in text


def page_is_unharmed(text: str) -> None:
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_a_runs_report(tmp_path) -> None:
    config = {"max_train_steps": 2, "validation_prompts": [NAME]}
    (tmp_path / "run.json").write_text(
        json.dumps({"method": NAME, "model": NAME, "train_config": config})
    )
    line = {"step": 1, "seconds": 1.0, f"loss/{NAME}": 1.0, "teacher_rmse": 1.0}
    for name in ("log.jsonl", "validation.jsonl"):
        (tmp_path / name).write_text(json.dumps(line) + "\n")
    events = [{"kind": "alarm", "step": 1, "line": NAME},
              {"kind": "end", "step": 1, "state": NAME, "why": NAME}]  # fmt: skip
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    best = {"checkpoint": "checkpoint-1", "step": 1, "metric": NAME, "value": 1.0}
    (tmp_path / "best.json").write_text(json.dumps(best))
    page_is_unharmed(render(read_run(tmp_path)))


@pytest.mark.full
def test_an_evaluations_page_and_picture(tmp_path) -> None:
    numbers = [Number("frechet", Measured(1.0), NAME, "teacher")]
    systems = [System(NAME, group, 1, numbers, 2) for group in ("teacher", "student")]
    protocol = {
        **dict.fromkeys(("guidance", "student_guidance", "reference", "dtype", "device"), NAME),
        **dict.fromkeys(("peak_memory_of", "frame", "frames", "preset"), NAME),
        **dict.fromkeys(("num_prompts", "num_images_per_prompt", "num_reference"), 2),
        **dict.fromkeys(("nearest_k", "manifold_images", "batch_size"), 2),
        "networks": {NAME: {"preprocess": NAME, "weights": NAME}},
        "scorers": {NAME: NAME},
        "seeds": [0],
        "versions": {NAME: NAME},
    }
    made = Evaluation(NAME, systems, protocol, "teacher", [NAME], tmp_path)
    made.page().write(tmp_path / "report.html", tmp_path / "report.png")
    page_is_unharmed((tmp_path / "report.html").read_text())


@pytest.mark.full
def test_a_comparisons_files(tmp_path) -> None:
    base = [compared_row("teacher", "teacher", 1, 40.0), compared_row(NAME, "teacher", 50, 2.0)]
    (tmp_path / "teacher_rows.json").write_text(json.dumps(base))
    (tmp_path / "results").mkdir()
    content = {"updates": [1], "cpu_seconds": 1.0, "seconds": 1.0, "seed": 0, "budget": "1s",
               "terms": {NAME: NAME}, "rows": [compared_row(NAME, "student", 1, 2.0)]}  # fmt: skip
    (tmp_path / "results" / "a.json").write_text(json.dumps(content))
    (tmp_path / "failures").mkdir()
    failure = {"recipe": NAME, "steps": [1], "seed": 0, "error": NAME}
    (tmp_path / "failures" / "a.json").write_text(json.dumps(failure))
    write_comparison(tmp_path)
    page_is_unharmed((tmp_path / "report.html").read_text())
    unharmed((tmp_path / "table.md").read_text(), [])


def test_a_demos_page_and_picture(tmp_path: Path) -> None:
    rows = [demo_row("teacher", 1, 2.0), demo_row("student", 1, 2.2)]
    report = DemoReport(NAME, rows, [], NAME, [(NAME, NAME)])
    report.page().write(tmp_path / "report.html", tmp_path / "report.png")
    page_is_unharmed((tmp_path / "report.html").read_text())
