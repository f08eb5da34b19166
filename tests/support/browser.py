"""A page as a real browser shows it: on a screen of any width, light or dark."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from pathlib import Path
from typing import Any

from support.processes import LIMIT_S

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")

# A window is never as narrow as a phone; a frame is. Contrast is WCAG's ratio of luminances, of
# each text that is seen against the nearest background that is not see-through.
_FRAME = """<!doctype html><meta charset="utf-8"><iframe id="page"
  style="width: {width}px; height: 844px; border: 0" srcdoc="{page}"></iframe>
<script>addEventListener('load', () => {{
  const view = document.getElementById('page').contentWindow, page = view.document;
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = colour => colour.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = element => {{
    for (let e = element; e; e = e.parentElement) {{
      const colour = rgb(view.getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }}
    return view.matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18] : [255, 255, 255];
  }};
  const contrast = element => {{
    const style = view.getComputedStyle(element);
    const front = light(rgb(element.namespaceURI.endsWith('svg') ? style.fill : style.color));
    const back = light(behind(element));
    return (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  }};
  const texts = [...page.body.querySelectorAll('*')].filter(e => e.checkVisibility()
    && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())
    && !['STYLE', 'SCRIPT'].includes(e.tagName));
  const worst = texts.map(e => [contrast(e), e.textContent.trim().slice(0, 60)])
    .sort((a, b) => a[0] - b[0])[0];
  document.title = 'probe ' + JSON.stringify({{
    pictures: page.images.length,
    broken: [...page.images].filter(image => !image.naturalWidth).length,
    charts: [...page.querySelectorAll('svg')].filter(svg => svg.clientWidth > 200).length,
    width: page.documentElement.scrollWidth,
    small: texts.filter(e => parseFloat(view.getComputedStyle(e).fontSize) < 11.5).length,
    contrast: worst[0], faint: worst[1].replace(/[<>]/g, ' '),
    dark: light(behind(page.body)) < 0.1,
    fetched: view.performance.getEntriesByType('resource').map(e => e.name)
      .filter(name => !name.startsWith('data:')),
  }}); }});</script>"""


def probe(html: str, folder: Path, width: int = 1280, dark: bool = False) -> dict[str, Any]:
    """What the browser made of a page: its console's lines, pictures, width, fetched addresses,
    the smallest contrast and where, ... Args: folder: for the browser's own files."""
    page = folder / "probe.html"
    page.write_text(_FRAME.format(width=width, page=escape(html)), encoding="utf-8")
    shown = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--blink-settings=preferredColorScheme={0 if dark else 1}",
         f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900",
         "--hide-scrollbars", "--virtual-time-budget=3000", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=LIMIT_S, check=True,
    )  # fmt: skip
    seen = re.search(r"<title>probe (\{.*?\})</title>", shown.stdout)
    assert seen is not None, shown.stderr[-2000:]
    console = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    return {**json.loads(seen[1].replace("&amp;", "&")), "console": console}
