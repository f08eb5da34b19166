"""Pictures for people: strips of samples and curves, without global matplotlib state."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator
from numpy.typing import NDArray
from PIL import Image

INK, MUTED, LINE, PAPER = "#14181f", "#6b7280", "#e3e6eb", "#ffffff"
COLOUR = {"real": "#6b7280", "teacher": "#2f6fde", "student": "#d9480f"}
# Okabe and Ito's palette, told apart by colour-blind readers; for many students in one plot.
CYCLE = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d00", "#0072b2", "#444444")
WIDTH_IN, LABEL_IN, MARGIN_IN, GAP_IN = 17.0, 2.6, 0.35, 0.09


@dataclass(frozen=True)
class Strip:
    """A row of samples as one picture. columns: images in it; breaks: columns with a gap before."""

    label: str
    caption: str
    picture: NDArray[np.uint8]
    columns: int
    colour: str = INK
    bold: bool = False
    breaks: Sequence[int] = ()


@dataclass(frozen=True)
class Curve:
    """Values with deviations at numeric places. line: joined, else points alone."""

    label: str
    at: Sequence[float]
    means: Sequence[float]
    stds: Sequence[float]
    colour: str
    line: bool = True
    marker: str = "o"
    told: bool = True  # its values stand beside the points
    above: bool = True


Panel = Callable[[Axes], None]


def save_page(
    path: Path,
    title: str,
    strips: Sequence[Strip],
    panels: Sequence[Panel],
    tall: float = 4.9,
    share: float = 0.88,
) -> None:
    """Strips below each other, then the panels side by side, as one PNG.

    Args: share: of its place that a panel fills; a legend beside it needs room.
    """
    cell = (WIDTH_IN - LABEL_IN - 2 * MARGIN_IN) / max(
        (strip.columns for strip in strips), default=1
    )
    cell = min(cell, 1.4)
    gallery = len(strips) * (cell + GAP_IN)
    height = 1.0 + gallery + (0.45 + tall if panels else 0) + MARGIN_IN
    figure = Figure(figsize=(WIDTH_IN, height), dpi=100, facecolor=PAPER)

    def place(left: float, top: float, width: float, tall: float) -> Axes:
        box = (left / WIDTH_IN, 1 - (top + tall) / height, width / WIDTH_IN, tall / height)
        return figure.add_axes(box)

    figure.text(MARGIN_IN / WIDTH_IN, 1 - 0.62 / height, title, fontsize=20,
                fontweight="bold", color=INK)  # fmt: skip
    top = 1.0
    for strip in strips:
        draw_strip(place(MARGIN_IN + LABEL_IN, top, cell * strip.columns, cell), strip)
        top += cell + GAP_IN
    wide = (WIDTH_IN - 2 * MARGIN_IN) / max(len(panels), 1)
    for index, panel in enumerate(panels):
        left = MARGIN_IN + index * wide
        panel(place(left + 0.35, top + 0.75, share * wide, tall - 1.2))
    figure.savefig(path, facecolor=PAPER)


def draw_strip(axes: Axes, strip: Strip) -> None:
    """One row: the label and its caption on the left of the pictures."""
    axes.set_axis_off()
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255} if strip.picture.ndim == 2 else {}
    axes.imshow(strip.picture, extent=(0, strip.columns, 1, 0), aspect="auto",
                interpolation="nearest" if len(strip.picture) < 64 else "antialiased",
                **grey)  # type: ignore[arg-type]  # fmt: skip
    for boundary in strip.breaks:
        axes.axvline(boundary, color=PAPER, linewidth=7)
    weight = "bold" if strip.bold else "normal"
    axes.text(-0.2, 0.36, strip.label, ha="right", va="center", fontsize=13, fontweight=weight,
              color=strip.colour)  # fmt: skip
    axes.text(-0.2, 0.72, strip.caption, ha="right", va="center", fontsize=9.5, color=MUTED)


def draw_curves(
    axes: Axes,
    curves: Sequence[Curve],
    title: str,
    xlabel: str,
    floor: tuple[str, float] | None = None,
    ticks: Sequence[float] = (),
    log_x: bool = True,
    legend: bool = True,
) -> None:
    """Values on a logarithmic axis (the lower, the better). Args: floor: (what, value)."""
    for curve in curves:
        axes.errorbar(curve.at, curve.means, yerr=curve.stds, capsize=3, marker=curve.marker,
                      markersize=8, linewidth=1.8 if curve.line else 0, elinewidth=1.4,
                      color=curve.colour, label=curve.label, zorder=3)  # fmt: skip
        for at, value in zip(curve.at, curve.means, strict=True) if curve.told else ():
            axes.annotate(f"{value:.3g}", (at, value), color=curve.colour,
                          textcoords="offset points", xytext=(0, 11 if curve.above else -19),
                          ha="center", fontsize=10)  # fmt: skip
    if floor is not None and floor[1] > 0:
        axes.axhline(floor[1], color=COLOUR["real"], linestyle=(0, (4, 3)), linewidth=1.2)
        short = f"{floor[1]:.2f}" if floor[1] >= 1 else f"{floor[1]:.3g}"
        axes.annotate(f"{floor[0]} {short}", (1, floor[1]),
                      xycoords=("axes fraction", "data"), textcoords="offset points",
                      xytext=(-6, -5), ha="right", va="top", fontsize=9.5, color=MUTED)  # fmt: skip
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log")
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_ylim(low * 0.8, high * 1.25)  # the floor is named below its line
    decades = round_ticks(low * 0.8, high * 1.25)
    axes.set_yticks(decades, [f"{value:g}" for value in decades])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.set_xlabel(xlabel, fontsize=10, color=MUTED)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    if curves and legend:
        if len(curves) > 4:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10.5)
        else:
            axes.legend(frameon=False, loc="best", fontsize=10.5)


def round_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two positive values, for a logarithmic axis; where
    these are fewer than two, round values evenly apart."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    rounded = [float(f"{m}e{e}") for e in exponents for m in (1, 2, 5)]
    found = [value for value in rounded if low <= value <= high]
    if len(found) < 2:
        even = MaxNLocator(4).tick_values(low, high)
        found = [float(f"{value:.6g}") for value in even if low <= value <= high]
    return found


def save_panels(path: Path, panels: Sequence[Panel], columns: int = 2) -> None:
    """Panels in rows of `columns` as one PNG."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(7.5 * columns, 4.2 * rows), dpi=100, facecolor=PAPER)
    for index, panel in enumerate(panels):
        panel(figure.add_subplot(rows, columns, index + 1))
    figure.tight_layout()
    figure.savefig(path, facecolor=PAPER)


def panel_png(panel: Panel, tall: float = 4.2) -> bytes:
    """A panel alone as PNG bytes for a page."""
    figure = Figure(figsize=(7.5, tall), dpi=110, facecolor=PAPER)
    panel(figure.add_subplot())
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=PAPER)
    return buffer.getvalue()


def contact(paths: Sequence[str | Path], side: int = 128) -> NDArray[np.uint8]:
    """Pictures in a row, each inside a square of `side` px (of its own size where smaller)."""
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    side = min(side, max(max(image.size) for image in images))
    sheet = Image.new("RGB", (len(images) * (side + 1) - 1, side), "white")
    for index, image in enumerate(images):
        image.thumbnail((side, side))
        left = index * (side + 1) + (side - image.width) // 2
        sheet.paste(image, (left, (side - image.height) // 2))
    return np.asarray(sheet)
