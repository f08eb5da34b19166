"""report.png: the samples, the distance against steps, the table and the verdicts on one page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .metrics import PREVIEWS_PER_CLASS, Row
from .report import COLUMNS, Report, cells
from .report_images import strip

INK, MUTED, LINE, PAPER = "#14181f", "#6b7280", "#e3e6eb", "#ffffff"
COLOUR = {"real": "#6b7280", "teacher": "#2f6fde", "student": "#d9480f"}
WIDTH_IN, LABEL_IN, MARGIN_IN, GAP_IN = 17.0, 2.6, 0.35, 0.09
GOOD, BAD, OPEN = "#15803d", "#b91c1c", "#b45309"


def save_png(report: Report, path: Path) -> None:
    """Draws the page; no display and no global matplotlib state are needed."""
    columns, count = len(report.rows[0].previews), len(report.rows)
    cell = (WIDTH_IN - LABEL_IN - 2 * MARGIN_IN) / columns  # square digits
    gallery, lower = count * (cell + GAP_IN), 4.9
    height = 1.0 + gallery + 0.45 + lower + MARGIN_IN
    figure = Figure(figsize=(WIDTH_IN, height), dpi=100, facecolor=PAPER)

    def place(left: float, top: float, width: float, tall: float) -> Axes:
        box = (left / WIDTH_IN, 1 - (top + tall) / height, width / WIDTH_IN, tall / height)
        return figure.add_axes(box)

    figure.text(MARGIN_IN / WIDTH_IN, 1 - 0.62 / height, report.title, fontsize=20,
                fontweight="bold", color=INK)  # fmt: skip
    top = 1.0
    for row in report.rows:
        axes = place(MARGIN_IN + LABEL_IN, top, cell * columns, cell)
        _strip(axes, row, columns)
        top += cell + GAP_IN
    half = (WIDTH_IN - 2 * MARGIN_IN) / 2
    _curve(place(MARGIN_IN + 0.35, top + 0.75, 0.88 * half, lower - 1.2), report)
    _table(place(MARGIN_IN + half, top + 0.45, half, lower), report)
    figure.savefig(path, facecolor=PAPER)


def _strip(axes: Axes, row: Row, columns: int) -> None:
    axes.set_axis_off()
    axes.imshow(strip(row.previews, columns), cmap="gray", vmin=0, vmax=255,
                extent=(0, columns, 1, 0), interpolation="nearest", aspect="auto")  # fmt: skip
    for boundary in range(PREVIEWS_PER_CLASS, columns, PREVIEWS_PER_CLASS):
        axes.axvline(boundary, color=PAPER, linewidth=7)
    weight = "bold" if row.group == "student" else "normal"
    axes.text(-0.2, 0.36, row.label, ha="right", va="center", fontsize=13, fontweight=weight,
              color=COLOUR[row.group])  # fmt: skip
    scores = f"Fréchet {row.frechet.mean:.2f}  recall {row.recall.mean:.2f}"
    axes.text(-0.2, 0.72, scores, ha="right", va="center", fontsize=9.5, color=MUTED)


def _curve(axes: Axes, report: Report) -> None:
    for group, marker in (("teacher", "o"), ("student", "D")):
        rows = sorted(
            (r for r in report.rows if r.group == group and r.steps), key=lambda r: r.steps or 0
        )
        if not rows:
            continue
        steps = [row.steps or 0 for row in rows]
        values = [row.frechet.mean for row in rows]
        axes.errorbar(steps, values, yerr=[row.frechet.std for row in rows], capsize=3,
                      marker=marker, markersize=8, linewidth=1.8 if group == "teacher" else 0,
                      elinewidth=1.4, color=COLOUR[group], label=group, zorder=3)  # fmt: skip
        above = group == "teacher"
        for row, step, value in zip(rows, steps, values, strict=True):
            axes.annotate(f"{row.frechet.mean:.2f}", (step, value), color=COLOUR[group],
                          textcoords="offset points", xytext=(0, 11 if above else -19),
                          ha="center", fontsize=10)  # fmt: skip
    floor = next((row for row in report.rows if row.group == "real"), None)
    if floor is not None:
        axes.axhline(floor.frechet.mean, color=COLOUR["real"], linestyle=(0, (4, 3)), linewidth=1.2)
        axes.annotate(f"held-out floor {floor.frechet.mean:.2f}", (1, floor.frechet.mean),
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      xytext=(-6, 5), ha="right", fontsize=9.5, color=MUTED)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({row.steps for row in report.rows if row.steps})
    axes.set_xticks(ticks, [str(step) for step in ticks])
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low * 0.85, high * 1.25)
    decades = [value for value in (1, 2, 5, 10, 20, 50, 100) if low * 0.85 < value < high * 1.25]
    axes.set_yticks(decades, [str(value) for value in decades])
    axes.set_title("Fréchet distance against sampling steps (lower is better)", loc="left",
                   fontsize=12, color=INK)  # fmt: skip
    axes.set_xlabel("steps = network calls per image", fontsize=10, color=MUTED)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(frameon=False, loc="upper right", fontsize=10.5)


def _table(axes: Axes, report: Report) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    edges = (0.0, 0.345, 0.49, 0.655, 0.785, 0.88, 1.0)  # right edges; the first column is left
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
