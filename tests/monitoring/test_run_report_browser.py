"""The live report in a real browser, where there is one: no message, all pictures, a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape

import pytest
from PIL import Image

from stepdistill.monitoring.records import read_run
from stepdistill.monitoring.run_report import render

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
# A window is never as narrow as a phone; a frame is.
FRAME = """<!doctype html><iframe style="width: {width}px; height: 844px; border: 0"
  srcdoc="{page}">
</iframe><script>addEventListener('load', () => {{
  const frame = document.querySelector('iframe'), page = frame.contentDocument;
  document.title = 'probe ' + JSON.stringify({{
    pictures: page.images.length,
    broken: [...page.images].filter(image => !image.naturalWidth).length,
    charts: [...page.querySelectorAll('svg')].filter(svg => svg.clientWidth > 200).length,
    width: page.documentElement.scrollWidth}}); }});</script>"""


@pytest.mark.full
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_all_of_it_without_a_word(tmp_path, width) -> None:
    facts = {
        "method": "dmd2", "model": "a/" + "very-long-name" * 12,
        "train_config": {"max_train_steps": 30, "validation_prompts": ["x" * 300]},
    }  # fmt: skip
    (tmp_path / "run.json").write_text(json.dumps(facts))
    log = [{"step": s, "seconds": s, "loss/student": 1 / s, "grad_norm/fake": 2.0} for s in (1, 2)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    row = {"step": 0, "teacher_rmse": 0.5, "trajectory": {}}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    alarm = {"kind": "alarm", "step": 1, "line": "watchdog: " + "x" * 300}
    (tmp_path / "events.jsonl").write_text(json.dumps(alarm) + "\n")
    (tmp_path / "validation").mkdir()
    for name in ("teacher", "step-0"):
        Image.new("RGB", (2000, 900), (9, 90, 200)).save(tmp_path / "validation" / f"{name}.png")
    page = tmp_path / "probe.html"
    page.write_text(FRAME.format(width=width, page=escape(render(read_run(tmp_path)))))
    shown = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900",
         "--hide-scrollbars", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    found = re.search(r"<title>probe (\{.*?\})</title>", shown.stdout)
    assert found is not None
    told = json.loads(found[1])
    assert (told["pictures"], told["broken"], told["charts"]) == (2, 0, 3)
    assert told["width"] <= width
