"""The comparison's pictures: methods as rows of samples, and quality against steps and time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray

from stepdistill.demo.metrics import PREVIEWS_PER_CLASS
from stepdistill.demo.report_images import strip as digit_strip
from stepdistill.evaluation import page
from stepdistill.evaluation.plots import (
    COLOUR,
    CYCLE,
    Curve,
    Panel,
    Strip,
    contact,
    draw_curves,
    round_ticks,
)

from .found import Comparison
from .table import Judged, short, steps_told


def shown(found: Comparison) -> list[Judged]:
    """The picture's rows: the teacher's, then the first seed's of each method and step count."""
    first = {(row.label, row.steps): row for row in reversed(found.students)}
    return [row for row in found.base if row.steps] + [first[key] for key in found.table]


def name(row: Judged) -> str:
    """With its steps."""
    return f"{row.label}, {steps_told(row.steps or 0)}"


def caption(row: Judged) -> str:
    """Its figures."""
    if row.frechet is None:
        return ""
    recall = "" if row.recall is None else f"  recall {row.recall.mean:.2f}"
    return f"Fréchet {short(row.frechet.mean)}{recall}"


def picture(previews: Sequence[Any]) -> NDArray[np.uint8]:
    """The previews in a row: pictures of paths, or digits in dark ink."""
    if isinstance(previews[0], str):
        return contact(previews)
    return digit_strip(torch.tensor(previews), len(previews))


def strips(found: Comparison) -> list[Strip]:
    """A row of samples for each of `shown`, for the PNG."""
    return [
        Strip(
            name(row),
            caption(row),
            picture(row.previews),
            len(row.previews),
            COLOUR[row.group],
            bold=row.group == "student",
        )
        for row in shown(found)
        if row.previews
    ]


def _looks(found: Comparison) -> dict[str, dict[str, Any]]:
    """Method -> colour and marker, the same in every plot."""
    return {
        one: {
            "colour": CYCLE[i % len(CYCLE)],
            "marker": "osD^vPX*"[i // len(CYCLE) % 8],
            "told": False,
        }
        for i, one in enumerate(found.methods)
    }


def panels(found: Comparison) -> list[Panel]:
    """Quality against steps, and against training time."""
    looks = _looks(found)
    steps, times = [], []
    base = sorted(found.teacher.items())
    if base:
        at, means = zip(*base, strict=True)
        steps.append(Curve("teacher", at, means, [0.0] * len(at), COLOUR["teacher"], told=False))
    for method in found.methods:
        own = sorted((key[1], cell) for key, cell in found.table.items() if key[0] == method)
        look = looks[method]
        curve = [cell for _, cell in own]
        steps.append(
            Curve(method, [n for n, _ in own], [c.frechet for c in curve], [c.std for c in curve],
                  **look)
        )  # fmt: skip
        times.append(
            Curve(method, [max(c.seconds, 1e-3) for c in curve], [c.frechet for c in curve],
                  [c.std for c in curve], line=False, **look)
        )  # fmt: skip
    floor = next((r.frechet.mean for r in found.base if r.group == "real" and r.frechet), None)
    told = None if floor is None else ("real images", floor)
    ticks = sorted({*found.counts, *found.teacher})
    title = "Fréchet distance against {} (lower is better)"
    spent = "seconds of training, a point for each student"

    def against_time(axes: Axes) -> None:  # the colours are those of the first panel
        draw_curves(axes, times, title.format("training time"), spent, log_x=False, legend=False)
        axes.set_xlim(left=0)  # of one budget they lie below each other, whatever the noise

    return [
        lambda axes: draw_curves(axes, steps, title.format("steps"), "steps", told, ticks),
        against_time,
    ]


def training_panels(found: Comparison) -> list[tuple[str, Panel]]:
    """(what, panel): for each step count quality against training time and against updates, a line
    through each method's mean and a dot for each seed. Empty where no run was judged on its way."""
    made: list[tuple[str, Panel]] = []
    for steps in sorted({key[1] for key in found.curves}):
        for over, spent in (("seconds", "seconds of training"), ("updates", "student updates")):
            title = f"Fréchet distance over {over} of training, {steps_told(steps)}"
            made.append((title, partial(_draw_training, found, steps, over == "seconds", spent)))
    return made


def _draw_training(found: Comparison, steps: int, by_time: bool, spent: str, axes: Axes) -> None:
    lines = []
    looks = _looks(found)
    for (method, n), readings in found.curves.items():
        if n == steps:
            at = [r.cell.seconds if by_time else r.updates for r in readings]
            means = [r.cell.frechet for r in readings]
            lines.append(Curve(method, at, means, [0.0] * len(at), **looks[method]))
            for reading in readings if readings[0].cell.num_seeds > 1 else ():
                places = [one[2] if by_time else one[1] for one in reading.each]
                values = [one[3] for one in reading.each]
                colour = looks[method]["colour"]
                axes.scatter(places, values, s=14, color=colour, alpha=0.5, linewidths=0, zorder=2)
    most = max(found.teacher, default=None)
    floor = None if most is None else (f"teacher, {steps_told(most)}", found.teacher[most])
    ends = [value for line in lines for value in (line.at[0], line.at[-1])]
    over = "seconds" if by_time else "updates"
    title = f"Fréchet distance over {over}, {steps_told(steps)}"
    draw_curves(axes, lines, title, spent, floor, round_ticks(0.7 * min(ends), 1.4 * max(ends)))


def figure(row: Judged) -> page.Strip:
    """The same for the page."""
    kind = row.group
    if row.previews and not isinstance(row.previews[0], str):  # digits: one of each class a line
        parts = [row.previews[i::PREVIEWS_PER_CLASS] for i in range(PREVIEWS_PER_CLASS)]
    else:
        half = -(-len(row.previews) // 2)
        parts = [part for part in (row.previews[:half], row.previews[half:]) if part]
    pictures = [picture(part) for part in parts]
    small = bool(pictures) and len(pictures[0]) < page.SMALL_PX
    return page.Strip(kind, name(row), caption(row), pictures, small=small)
