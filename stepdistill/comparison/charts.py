"""The comparison's charts: quality against steps, against time, and while training."""

from __future__ import annotations

from typing import Any

from stepdistill.reporting.charts import Chart, Curve, log_ticks
from stepdistill.reporting.style import COLOUR, CYCLE
from stepdistill.reporting.values import counted

from .results import Comparison


def _looks(compared: Comparison) -> dict[str, dict[str, Any]]:
    """Method -> colour and marker, the same in every chart."""
    return {
        method: {
            "colour": CYCLE[i % len(CYCLE)],
            "marker": "osD^vPX*"[i // len(CYCLE) % 8],
            "values": False,
        }
        for i, method in enumerate(compared.methods)
    }


def quality_charts(compared: Comparison) -> list[Chart]:
    """Quality against steps, and against training time."""
    steps, times = [], []
    base = sorted(compared.teacher.items())
    if base:
        at, means = zip(*base, strict=True)
        colour = COLOUR["teacher"]
        steps.append(Curve("teacher", at, means, [0.0] * len(at), colour, values=False))
    for method, look in _looks(compared).items():
        cells = {key[1]: cell for key, cell in sorted(compared.table.items()) if key[0] == method}
        seconds = [max(cell.seconds, 1e-3) for cell in cells.values()]
        means, stds = zip(*((cell.frechet, cell.std) for cell in cells.values()), strict=True)
        steps.append(Curve(method, list(cells), means, stds, **look))
        times.append(Curve(method, seconds, means, stds, line=False, **look))
    floor = next((r.frechet.mean for r in compared.base if r.group == "real" and r.frechet), None)
    level = None if floor is None else ("real images", floor)
    ticks = sorted({*compared.counts, *compared.teacher})
    about = "Fréchet distance against {}"
    title, spent = f"{about} (lower is better)", "seconds of training, a point for each student"
    return [
        Chart(title.format("steps"), "steps", steps, level, ticks, about=about.format("steps")),
        # Colours are those of the first. Of one budget the points lie below each other, whatever
        # the noise: time begins at zero.
        Chart(title.format("training time"), spent, times, log_x=False, legend=False,
              about=about.format("training time")),
    ]  # fmt: skip


def training_charts(compared: Comparison) -> list[Chart]:
    """For each step count quality against training time and against updates, a line through each
    method's mean and a dot for each seed. Empty where no run was judged on its way."""
    counts = sorted({key[1] for key in compared.curves})
    return [_training_chart(compared, n, over) for n in counts for over in ("seconds", "updates")]


def _training_chart(compared: Comparison, steps: int, over: str) -> Chart:
    curves, looks = [], _looks(compared)
    by_time = over == "seconds"
    for (method, n), readings in compared.curves.items():
        if n == steps:
            at = [r.cell.seconds if by_time else r.updates for r in readings]
            means = [r.cell.frechet for r in readings]
            several = readings[0].cell.num_seeds > 1
            each = [one for reading in readings if several for one in reading.each]
            dots = [(one[2] if by_time else one[1], one[3]) for one in each]
            curves.append(Curve(method, at, means, [0.0] * len(at), dots=dots, **looks[method]))
    most = max(compared.teacher, default=None)
    level = (f"teacher, {counted(most, 'step')}", compared.teacher[most]) if most else None
    ends = [value for curve in curves for value in (curve.at[0], curve.at[-1])]
    title = f"Fréchet distance over {over}, {counted(steps, 'step')}"
    about = f"Fréchet distance over {over} of training, {counted(steps, 'step')}"
    spent = "seconds of training" if by_time else "student updates"
    ticks = log_ticks(0.7 * min(ends), 1.4 * max(ends))
    return Chart(title, spent, curves, level, ticks, about=about)
