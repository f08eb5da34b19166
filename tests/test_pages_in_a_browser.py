"""Every kind of page in a real browser, if there is one: silent, whole, on a phone, in the dark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comparison.test_report import row as compared_row
from demo.test_report import rows as demo_rows
from evaluation.test_evaluate import Corners, brightness, options
from PIL import Image
from support.browser import BROWSER, probe
from support.runs import teacher_dir

from stepdistill.comparison import report as comparison
from stepdistill.demo import report as demo
from stepdistill.demo.verdict import quality_checks
from stepdistill.evaluation.run import evaluate
from stepdistill.monitoring.records import read_run
from stepdistill.monitoring.run_report import render

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine"),
]
LONG = "x" * 300


def run_page(folder: Path) -> str:
    facts = {
        "method": "dmd2", "model": "a/" + "very-long-name" * 12,
        "train_config": {"max_train_steps": 30, "validation_prompts": [LONG]},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(facts))
    log = [{"step": s, "seconds": s, "loss/student": 1 / s, "grad_norm/fake": 2.0} for s in (1, 2)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    row = {"step": 0, "teacher_rmse": 0.5, "trajectory": {}}
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n")
    alarm = {"kind": "alarm", "step": 1, "line": "watchdog: " + LONG}
    (folder / "events.jsonl").write_text(json.dumps(alarm) + "\n")
    (folder / "validation").mkdir()
    for name in ("teacher", "step-0"):
        Image.new("RGB", (2000, 900), (9, 90, 200)).save(folder / "validation" / f"{name}.png")
    return render(read_run(folder))


def demo_page(folder: Path) -> str:
    rows = demo_rows(recall=0.7)
    shown = demo.Report(
        "Digits", rows, quality_checks(rows), f"pipeline({LONG!r})", [("Method", LONG)], 539, 3
    )
    return demo.write_report(shown, folder)[0].read_text(encoding="utf-8")


def comparison_page(folder: Path) -> str:
    base = [compared_row("real (train)", "real", None, 1.3)]
    base += [compared_row("teacher", "teacher", steps, 40.0 / steps) for steps in (1, 50)]
    (folder / "teacher_rows.json").write_text(json.dumps(base))
    for name in ("results", "failures"):
        (folder / name).mkdir()
    facts = {"updates": [10, 40], "cpu_seconds": 61.0, "seconds": 60.0, "seed": 0}
    content = {**facts, "rows": [compared_row("dmd2", "student", 1, 2.0)]}
    (folder / "results" / "dmd2_1_seed0.json").write_text(json.dumps(content))
    failure = {"recipe": "pcm", "steps": [2], "seed": 0, "error": LONG}
    (folder / "failures" / "pcm_2_seed0.json").write_text(json.dumps(failure))
    comparison.write(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def evaluation_page(folder: Path, tmp_path_factory) -> str:
    (folder / "prompts.txt").write_text(f"a red cube\n{LONG}\n")
    given = options(teacher_dir("sd3", tmp_path_factory), folder / "prompts.txt", folder / "out")
    made = evaluate(given, [Corners()], {"brightness": brightness})
    return (made.folder / "report.html").read_text(encoding="utf-8")


# Name -> (page, charts that the browser draws itself).
PAGES = {"run": 3, "demo": 0, "comparison": 0, "evaluation": 0}


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp(request.param)
    make = globals()[f"{request.param}_page"]
    more = [tmp_path_factory] if request.param == "evaluation" else []
    return request.param, make(folder, *more)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_all_of_it_without_a_word(page, width, dark, tmp_path) -> None:
    name, html = page
    seen = probe(html, tmp_path, width, dark)
    assert seen["console"] == []
    assert seen["fetched"] == []
    assert seen["pictures"] > 0
    assert (seen["broken"], seen["charts"]) == (0, PAGES[name])
    assert seen["width"] <= width
    assert seen["small"] == 0
    assert seen["dark"] == dark
    assert seen["contrast"] >= 4.5, seen["faint"]  # WCAG 2.2, 1.4.3
