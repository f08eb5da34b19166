"""The comparison's pictures: methods as rows of samples, and quality against steps and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray

from stepdistill.demo.metrics import PREVIEWS_PER_CLASS
from stepdistill.demo.report_images import strip as digit_strip
from stepdistill.evaluation import page
from stepdistill.evaluation.plots import COLOUR, CYCLE, Curve, Panel, Strip, contact, draw_curves

from .found import Comparison
from .table import Judged, short


def shown(found: Comparison) -> list[Judged]:
    """The picture's rows: the teacher's, then the first seed's of each method and step count."""
    first = {(row.label, row.steps): row for row in reversed(found.students)}
    return [row for row in found.base if row.steps] + [first[key] for key in found.table]


def name(row: Judged) -> str:
    """With its steps."""
    return f"{row.label}, {row.steps} step{'s' * (row.steps != 1)}"


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


def panels(found: Comparison) -> list[Panel]:
    """Quality against steps, and against training time."""
    colours = {one: CYCLE[i % len(CYCLE)] for i, one in enumerate(found.methods)}
    markers = {one: "osD^vPX*"[i // len(CYCLE) % 8] for i, one in enumerate(found.methods)}
    steps, times = [], []
    base = sorted(found.teacher.items())
    if base:
        at, means = zip(*base, strict=True)
        steps.append(Curve("teacher", at, means, [0.0] * len(at), COLOUR["teacher"], told=False))
    for method in found.methods:
        own = sorted((key[1], cell) for key, cell in found.table.items() if key[0] == method)
        look: dict[str, Any] = {"colour": colours[method], "marker": markers[method], "told": False}
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

    return [
        lambda axes: draw_curves(axes, steps, title.format("steps"), "steps", told, ticks),
        against_time,
    ]


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
