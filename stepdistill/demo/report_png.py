"""report.png: the samples, the distance against steps, the table and the verdicts on one page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from stepdistill.evaluation.plots import (
    COLOUR,
    INK,
    LINE,
    MUTED,
    Curve,
    Strip,
    draw_curves,
    save_page,
)

from .metrics import PREVIEWS_PER_CLASS, Row
from .report import COLUMNS, Report, cells
from .report_images import strip

GOOD, BAD, OPEN = "#15803d", "#b91c1c", "#b45309"


def save_png(report: Report, path: Path) -> None:
    """Draws the page; no display and no global matplotlib state are needed."""
    strips = [_strip(row) for row in report.rows]
    panels = [lambda axes: _curve(axes, report), lambda axes: _table(axes, report)]
    save_page(path, report.title, strips, panels)


def _strip(row: Row) -> Strip:
    columns = len(row.previews)
    return Strip(
        row.label,
        f"Fréchet {row.frechet.mean:.2f}  recall {row.recall.mean:.2f}",
        strip(row.previews, columns),
        columns,
        COLOUR[row.group],
        bold=row.group == "student",
        breaks=range(PREVIEWS_PER_CLASS, columns, PREVIEWS_PER_CLASS),
    )


def _curve(axes: Axes, report: Report) -> None:
    curves = []
    for group, marker in (("teacher", "o"), ("student", "D")):
        rows = sorted(
            (r for r in report.rows if r.group == group and r.steps), key=lambda r: r.steps or 0
        )
        if rows:
            teacher = group == "teacher"
            curves.append(
                Curve(
                    group,
                    [row.steps or 0 for row in rows],
                    [row.frechet.mean for row in rows],
                    [row.frechet.std for row in rows],
                    COLOUR[group],
                    line=teacher,
                    marker=marker,
                    above=teacher,
                )
            )
    floor = next((row.frechet.mean for row in report.rows if row.group == "real"), None)
    draw_curves(
        axes,
        curves,
        "Fréchet distance against sampling steps (lower is better)",
        "steps = network calls per image",
        floor=None if floor is None else ("held-out floor", floor),
        ticks=sorted({row.steps for row in report.rows if row.steps}),
    )


def _table(axes: Axes, report: Report) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    edges = (0.0, 0.335, 0.485, 0.66, 0.785, 0.88, 1.0)  # right edges; the first column is left
    line = 0.064
    y = 0.95
    for name, x in zip(COLUMNS, edges, strict=True):
        heading = name.replace("class ", "class\n").replace("network ", "network\n")
        axes.text(x, y, heading, fontsize=9.5, color=MUTED, ha="left" if x == 0 else "right",
                  va="bottom", linespacing=1.05)  # fmt: skip
    y -= 0.015
    axes.plot([0, 1], [y + 0.012, y + 0.012], color=LINE, linewidth=1.4)
    for row in report.rows:
        y = _table_row(axes, row, edges, y, line)
    y -= 0.3 * line
    for check in report.checks:
        colour = GOOD if check.passed else OPEN if check.aim else BAD
        axes.text(0.13, y, check.word, fontsize=10.5, color=colour, fontweight="bold", ha="right",
                  va="top")  # fmt: skip
        axes.text(0.15, y, check.claim, fontsize=10.5, color=INK, va="top")
        axes.text(1.0, y, check.measured, fontsize=10.5, color=MUTED, ha="right", va="top")
        y -= line


def _table_row(axes: Axes, row: Row, edges: tuple[float, ...], y: float, line: float) -> float:
    weight = "bold" if row.group == "student" else "normal"
    for text, x in zip(cells(row), edges, strict=True):
        colour = COLOUR[row.group] if x == 0 else INK
        axes.text(x, y - 0.006, text, fontsize=10.5, color=colour, fontweight=weight, va="top",
                  ha="left" if x == 0 else "right")  # fmt: skip
    y -= line
    axes.plot([0, 1], [y + 0.006, y + 0.006], color=LINE, linewidth=0.7)
    return y
