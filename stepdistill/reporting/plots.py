"""Pictures for people: strips of samples, charts and tables as PNG, without global matplotlib
state."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .blocks import Strip, Verdicts
from .charts import Chart, log_ticks
from .pictures import contact
from .style import BAD, COLOUR, GOOD, INK, LINE, MUTED, OPEN, PAPER
from .table import Table

WIDTH_IN, LABEL_IN, MARGIN_IN, GAP_IN = 17.0, 2.6, 0.35, 0.09
PANELS_IN = 4.9
LABEL_LETTERS = 22  # that a strip's label has room for, in bold


def save_page(path: Path, title: str, strips: Sequence[Strip], panels: Sequence[Any]) -> None:
    """Strips below each other, then the panels (see page.Report) side by side, as one PNG."""
    most = max((sum(map(len, strip.lines)) for strip in strips), default=1)
    cell = min((WIDTH_IN - LABEL_IN - 2 * MARGIN_IN) / most, 1.4)
    gallery = len(strips) * (cell + GAP_IN)
    height = 1.0 + gallery + (0.45 + PANELS_IN if panels else 0) + MARGIN_IN
    figure = Figure(figsize=(WIDTH_IN, height), dpi=100, facecolor=PAPER)

    def place(left: float, top: float, width: float, tall: float) -> Axes:
        box = (left / WIDTH_IN, 1 - (top + tall) / height, width / WIDTH_IN, tall / height)
        return figure.add_axes(box)

    figure.text(MARGIN_IN / WIDTH_IN, 1 - 0.62 / height, title, fontsize=20,
                fontweight="bold", color=INK, parse_math=False)  # fmt: skip
    top = 1.0
    for strip in strips:
        wide = cell * sum(map(len, strip.lines))
        draw_strip(place(MARGIN_IN + LABEL_IN, top, wide, cell), strip)
        top += cell + GAP_IN
    wide = (WIDTH_IN - 2 * MARGIN_IN) / max(len(panels), 1)
    for index, panel in enumerate(panels):
        beside = isinstance(panel, Chart) and any(map(_legend_beside, panels))
        axes = place(MARGIN_IN + index * wide + 0.35, top + 0.75,
                     (0.74 if beside else 0.88) * wide, PANELS_IN - 1.2)  # fmt: skip
        if isinstance(panel, Chart):
            draw_chart(axes, panel)
        else:
            draw_table(axes, *panel)
    figure.savefig(path, facecolor=PAPER)


def save_charts(path: Path, charts: Sequence[Chart], columns: int = 2) -> None:
    """Charts in rows of `columns` as one PNG."""
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(7.5 * columns, 4.2 * rows), dpi=100, facecolor=PAPER)
    for index, chart in enumerate(charts):
        draw_chart(figure.add_subplot(rows, columns, index + 1), chart)
    figure.tight_layout()
    figure.savefig(path, facecolor=PAPER)


def chart_png(chart: Chart) -> bytes:
    """A chart alone as PNG bytes for a page."""
    figure = Figure(figsize=(7.5, 4.2), dpi=110, facecolor=PAPER)
    draw_chart(figure.add_subplot(), chart)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAPER)
    return buffer.getvalue()


def draw_strip(axes: Axes, strip: Strip) -> None:
    """Its lines in one row, a gap between them; label and caption on the left."""
    axes.set_axis_off()
    sheet = contact([picture for line in strip.lines for picture in line])
    columns = sum(map(len, strip.lines))
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if sheet.ndim == 2 else {}
    axes.imshow(sheet, extent=(0, columns, 1, 0), aspect="auto",
                interpolation="nearest" if len(sheet) < 64 else "antialiased",
                **grey)  # type: ignore[arg-type]  # fmt: skip
    for index in range(1, len(strip.lines)):
        axes.axvline(sum(map(len, strip.lines[:index])), color=PAPER, linewidth=7)
    weight = "bold" if strip.kind == "student" else "normal"
    label, size = strip.label, 13.0
    if len(label) > LABEL_LETTERS:  # on two smaller lines, the end of a longer one left out
        label, size = textwrap.fill(label, int(1.35 * LABEL_LETTERS), max_lines=2,
                                    placeholder=" …"), 9.5  # fmt: skip
    axes.text(-0.2, 0.36, label, ha="right", va="center", fontsize=size, fontweight=weight,
              color=COLOUR[strip.kind], parse_math=False)  # fmt: skip
    axes.text(-0.2, 0.72, strip.caption, ha="right", va="center", fontsize=9.5, color=MUTED)


def _legend_beside(panel: Any) -> bool:
    return isinstance(panel, Chart) and panel.legend and len(panel.curves) > 4


def draw_chart(axes: Axes, chart: Chart) -> None:
    """See Chart."""
    for curve in chart.curves:
        axes.errorbar(curve.at, curve.means, yerr=curve.stds, capsize=3, marker=curve.marker,
                      markersize=8, linewidth=1.8 if curve.line else 0, elinewidth=1.4,
                      color=curve.colour, label=curve.label, zorder=3)  # fmt: skip
        for x, y in curve.dots:
            axes.scatter(x, y, s=14, color=curve.colour, alpha=0.5, linewidths=0, zorder=2)
        for at, value in zip(curve.at, curve.means, strict=True) if curve.values else ():
            axes.annotate(f"{value:.3g}", (at, value), color=curve.colour,
                          textcoords="offset points", xytext=(0, 11 if curve.above else -19),
                          ha="center", fontsize=10)  # fmt: skip
    if chart.level is not None and chart.level[1] > 0:
        name, level = chart.level
        axes.axhline(level, color=COLOUR["real"], linestyle=(0, (4, 3)), linewidth=1.2)
        short = f"{level:.2f}" if level >= 1 else f"{level:.3g}"
        axes.annotate(f"{name} {short}", (1, level),
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      xytext=(-6, -5), ha="right", va="top", fontsize=9.5, color=MUTED)  # fmt: skip
    axes.set_xscale("log" if chart.log_x else "linear")
    axes.set_yscale("log")
    if chart.ticks:
        axes.set_xticks(chart.ticks, [f"{tick:g}" for tick in chart.ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    if not chart.log_x:
        axes.set_xlim(left=0)
    low, high = axes.get_ylim()
    low, high = low * 0.8, high * 1.25  # the level is named below its line
    axes.set_ylim(low, high)
    axes.set_yticks(log_ticks(low, high), [f"{value:g}" for value in log_ticks(low, high)])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(chart.title, loc="left", fontsize=12, color=INK)
    axes.set_xlabel(chart.x_label, fontsize=10, color=MUTED)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if chart.legend and chart.curves:
        place: Any = {"loc": "best"}
        if _legend_beside(chart):
            place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)}
        for text in axes.legend(frameon=False, fontsize=10.5, **place).get_texts():
            text.set_parse_math(False)  # a dollar in a name is a dollar


def draw_table(axes: Axes, table: Table, verdicts: Verdicts) -> None:
    """The table with its first column on the left, and the verdicts below it."""
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    heads = [name.replace(" ", "\n", 1) if len(name) > 9 else name for name in table.columns]
    cells = [[*heads[i].split("\n"), *(line.cells[i] for line in table.lines)]
             for i in range(len(heads))]  # fmt: skip
    wide = [max(map(len, column)) + 2 for column in cells]
    edges = [0.0, *(sum(wide[: i + 1]) / sum(wide) for i in range(1, len(wide)))]  # right ones
    line_height, y = 0.064, 0.95

    def row(cells: Sequence[str], colour: str, first: str, size: float, **more: Any) -> None:
        for text, x in zip(cells, edges, strict=True):
            axes.text(x, y, text, fontsize=size, color=first if x == 0 else colour,
                      ha="left" if x == 0 else "right", parse_math=False, **more)  # fmt: skip

    row(heads, MUTED, MUTED, 9.5, va="bottom", linespacing=1.05)
    y -= 0.003
    for line in table.lines:
        axes.plot([0, 1], [y, y], color=LINE, linewidth=0.7)
        y -= 0.012
        weight = "bold" if line.kind == "student" else "normal"
        row(line.cells, INK, COLOUR[line.kind], 10.5, va="top", fontweight=weight)
        y -= line_height - 0.012
    y -= 0.3 * line_height
    for kind, word, claim, measured in verdicts.lines:
        colour = {"good": GOOD, "open": OPEN, "bad": BAD}[kind]
        axes.text(0.13, y, word, fontsize=10.5, color=colour, fontweight="bold", ha="right",
                  va="top")  # fmt: skip
        axes.text(0.15, y, claim, fontsize=10.5, color=INK, va="top")
        axes.text(1.0, y, measured, fontsize=10.5, color=MUTED, ha="right", va="top")
        y -= line_height
