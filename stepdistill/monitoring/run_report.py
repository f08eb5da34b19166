"""report.html of a training run: what it is, how it goes, what its samples look like.

One self-contained page (inline SVG and data: addresses), written whole, that reloads itself while
the run goes on. Drawn from run.json, log.jsonl, validation.jsonl, events.jsonl and best.json, so it
can be drawn again at any time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from stepdistill.reporting.blocks import Facts, Verdicts
from stepdistill.reporting.charts import Points, line_chart
from stepdistill.reporting.page import page
from stepdistill.reporting.pictures import file_img
from stepdistill.reporting.sound import file_audio
from stepdistill.reporting.values import short

from .records import RunRecords, read_run, series
from .run_answers import answers, clock

REPORT = "report.html"
REFRESH_SECONDS = 20
# Reloading in place keeps where the reader has scrolled to.
REFRESH = f"<script>setTimeout(() => location.reload(), {REFRESH_SECONDS * 1000});</script>"
_MAX_GRIDS = 5  # of the student, the first and the last among them
_MAX_SOUNDS = 3  # that a grid's samples are heard of

# Title, metrics (key -> name in the legend), what to read from it, the value to aim at.
_METRIC_CHARTS: tuple[tuple[str, dict[str, str], str, float | None], ...] = (
    ("Diagonal Fréchet distance", {"frechet_diagonal": "student"},
     "to the teacher's samples of the same noise; lower is closer", None),
    ("Distance to the teacher", {"teacher_rmse": "samples", "trajectory_rmse": "its trajectory"},
     "RMS, in the teacher's standard deviations", None),
    ("Diversity", {"diversity_ratio": "student / teacher"},
     "distance between samples of a prompt; below 1 they look alike", 1.0),
    ("Movement", {"movement_ratio": "student / teacher"},
     "distance of a video's frames from its first; near 0 is a still clip", 1.0),
    ("Spread and shift of x0", {"x0_std_ratio": "std ratio", "x0_mean_drift": "mean shift"},
     "against the teacher; aim at 1 and 0", 1.0),
    ("Saturation", {"saturation": "student", "saturation_excess": "above the teacher"},
     "share of values at black or white", None),
    ("Lag of the fake score", {"fake_lag": "lag"},
     "share of the student's gradient; 0 is a fake that keeps up", 0.0),
)  # fmt: skip


def write_run_report(folder: Path, write: Callable[[Path, str], None]) -> Path:
    """Draw the report of the run in `folder` and hand it to `write`; returns its path."""
    path = folder / REPORT
    write(path, render(read_run(folder)))
    return path


def render(run: RunRecords) -> str:
    """The page's text."""
    charts = (_validation_charts(run), _loss_charts(run), _optimiser_charts(run))
    titles = ("Quality", "Losses", "Optimiser")
    sections = [
        f'<section><h2>{title}</h2><div class="charts">{body}</div></section>'
        for title, body in zip(titles, charts, strict=True)
        if body
    ]
    settings = escape(json.dumps(run.facts, indent=2))
    body = (
        f"{_head(run)}{_alarms(run)}{_grids(run)}{''.join(sections)}"
        f"<section><details><summary>Settings and versions</summary><pre>{settings}</pre>"
        "</details></section>"
    )
    return page(_title(run), body, '<link rel="icon" href="data:,">' + REFRESH * (not run.end))


def _title(run: RunRecords) -> str:
    return f"{run.facts.get('method', 'run')} in {run.folder.resolve().name}"


# ---------------------------------------------------------------------- head
def _head(run: RunRecords) -> str:
    config = run.facts.get("train_config", {})
    planned = int(config.get("max_train_steps", 0)) or 1
    last: dict[str, Any] = run.log[-1] if run.log else {}
    state = run.end["state"] if run.end else "running"
    kind = state.split()[0]
    why = f'<p class="why">{escape(run.end["why"])}</p>' if run.end and run.end["why"] else ""
    speed = float(last.get("steps_per_second", 0.0))
    facts = {
        "Student update": f"{run.step} of {planned}",
        "Time": clock(float(last.get("seconds", 0.0))),
        "Updates per second": short(speed) if speed else "–",
    }
    if run.best:
        value = short(float(run.best["value"]))
        facts[f"Best {run.best['metric']}"] = f"{value} at {run.best['step']}"
    drawn = time.strftime("%Y-%m-%d %H:%M:%S")
    return (
        f'<section><h1>{escape(_title(run))} <span class="badge {escape(kind)}">{escape(state)}'
        f"</span></h1><p>Teacher {escape(str(run.facts.get('model', '?')))} · drawn "
        f'{drawn}</p>{why}<div class="bar"><i style="width:'
        f'{min(100.0, 100.0 * run.step / planned):.1f}%"></i></div>'
        f"{Facts(list(facts.items())).html()}</section>"
        f"<section>{Verdicts(answers(run)).html()}</section>"
    )


def _alarms(run: RunRecords) -> str:
    """The last alarms, the newest first."""
    if not run.alarms:
        return ""
    lines = "".join(f"<li>{escape(str(a.get('line', '')))}</li>" for a in run.alarms[-8:][::-1])
    more = f" (the last 8 of {len(run.alarms)})" if len(run.alarms) > 8 else ""
    return f'<section><h2>Alarms{more}</h2><ul class="alarms">{lines}</ul></section>'


# --------------------------------------------------------------------- grids
def _grids(run: RunRecords) -> str:
    """The teacher's grid and the student's over training, the same noise in each."""
    folder = run.folder / "validation"
    steps = [int(v["step"]) for v in run.validations]
    if not steps:
        return ""
    shown = _spread_out(sorted(set(steps)), _MAX_GRIDS)
    best = run.best["step"] if run.best else None
    if best in steps and best not in shown:
        shown = sorted({*shown, best})
    g = run.facts.get("teacher_guidance")
    guided = "" if g is None else "without guidance" if g == 1.0 else f"guidance {short(g)}"
    teacher = file_img(folder / "teacher.png", "teacher samples") + _players(folder, "teacher")
    figures = [_figure(teacher, "teacher", guided)]
    by_step = {int(v["step"]): v for v in run.validations}
    for step in shown:
        distance = by_step[step].get("teacher_rmse")
        note = "" if distance is None else f"distance to the teacher {short(distance)}"
        if step == best:
            note = f"best {run.best['metric']} {short(run.best['value'])}" if run.best else note
        image = file_img(folder / f"step-{step}.png", f"student samples at update {step}")
        name = "student before training" if step == 0 else f"student, update {step}"
        image += _players(folder, f"step-{step}")
        figures.append(_figure(image, name, note, "best" if step == best else ""))
    chosen = run.facts.get("validation", {})
    prompts = run.facts.get("train_config", {}).get("validation_prompts") or chosen.get(
        "prompts", []
    )
    some = "; ".join(map(str, prompts[:6])) + ("; ..." if len(prompts) > 6 else "")
    return (
        "<section><h2>Samples</h2>"
        f"<p>A row per prompt, the same noise in every grid: {escape(some)}</p>"
        f'<div class="grids">{"".join(figures)}</div></section>'
    )


def _players(folder: Path, grid: str) -> str:
    """Of sound, what the grid's first spectrograms show."""
    files = [folder / f"{grid}-{i}.wav" for i in range(_MAX_SOUNDS)]
    return "".join(file_audio(file, f"{grid}, sample {i}") for i, file in enumerate(files))


def _spread_out(steps: list[int], limit: int) -> list[int]:
    if len(steps) <= limit:
        return steps
    return [steps[round(i * (len(steps) - 1) / (limit - 1))] for i in range(limit)]


def _figure(image: str, name: str, note: str, kind: str = "") -> str:
    if not image:
        return ""
    return (
        f'<figure class="{kind}"><figcaption><h3>{escape(name)}</h3><span>{escape(note)}</span>'
        f"</figcaption>{image}</figure>"
    )


# -------------------------------------------------------------------- charts
def _marks(run: RunRecords) -> list[float]:
    return [float(alarm["step"]) for alarm in run.alarms]


def _validation_charts(run: RunRecords) -> str:
    values, drawn = series(run.validations, ""), []
    for title, names, note, level in _METRIC_CHARTS:
        lines = {name: values[key] for key, name in names.items() if key in values}
        drawn.append(line_chart(title, lines, note=note, marks=_marks(run), level=level))
    drawn.append(_trajectory_chart(run))
    return "".join(drawn)


def _trajectory_chart(run: RunRecords) -> str:
    """Error of one jump from the teacher's trajectory to its end, by time: first, middle, last."""
    known = [v for v in run.validations if len(v.get("trajectory", {}).get("t", ())) > 1]
    if not known:
        return ""
    lines: dict[str, Points] = {}
    for index in sorted({0, len(known) // 2, len(known) - 1}):
        curve = known[index]["trajectory"]
        name = f"update {known[index]['step']}"
        lines[name] = sorted(zip(curve["t"], curve["student"], strict=True))
    curve = known[-1]["trajectory"]
    lines["teacher in one jump"] = sorted(zip(curve["t"], curve["teacher"], strict=True))
    return line_chart(
        "Error along the teacher's trajectory",
        lines,
        x_label="time t (1 is noise)",
        note="RMS of x0 predicted in one jump from x_t; the steps trained for",
    )


def _loss_charts(run: RunRecords) -> str:
    """A chart a phase: its loss; and one for each phase's other logged values."""
    drawn, marks = [], _marks(run)
    losses = series(run.log, "loss/")
    for phase, points in losses.items():
        drawn.append(line_chart(f"Loss of {phase}", {phase: points}, marks=marks))
    for phase in losses:
        parts = series(run.log, f"{phase}/")
        others = {name: points for name, points in parts.items() if points != losses[phase]}
        for name, points in others.items():
            drawn.append(line_chart(f"{phase}: {name}", {name: points}, marks=marks))
    return "".join(drawn)


def _optimiser_charts(run: RunRecords) -> str:
    marks = _marks(run)
    norms, rates = series(run.log, "grad_norm/"), series(run.log, "lr/")
    speed = {"updates / s": [(r["step"], r["steps_per_second"]) for r in run.log
                             if "steps_per_second" in r]}  # fmt: skip
    return (
        line_chart("Gradient norms", norms, note="before clipping, by role", marks=marks)
        + line_chart("Learning rates", rates, note="by role", marks=marks)
        + line_chart("Speed", speed)
    )
