"""Charts: values with deviations for a drawn picture (see plots), and lines as inline SVG, which is
self-contained, sharp at every size and in the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from .values import short

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 480, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 38
_MAX_POINTS = 240
_LOG_RANGE = 30.0  # a wider spread of positive values gets a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """Values with deviations at numeric places. line: joined, else points alone; values: stand
    beside the points, above them or below; dots: what the means are of."""

    label: str
    at: Sequence[float]
    means: Sequence[float]
    stds: Sequence[float]
    colour: str
    line: bool = True
    marker: str = "o"
    values: bool = True
    above: bool = True
    dots: Points = field(default_factory=tuple)


@dataclass(frozen=True)
class Chart:
    """Curves over a logarithmic y axis (the lower, the better). level: (what, value) of a dashed
    line; ticks: of the x axis; log_x: else it begins at zero; about: what a page says it shows."""

    title: str
    x_label: str
    curves: Sequence[Curve]
    level: tuple[str, float] | None = None
    ticks: Sequence[float] = ()
    log_x: bool = True
    legend: bool = True
    about: str = ""


def thinned(points: Points, limit: int = _MAX_POINTS) -> list[tuple[float, float]]:
    """At most about `limit` points, each the mean of neighbours; non-finite ones left out."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, -(-len(finite) // limit))
    groups = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values between low and high, 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Powers of ten between two positive values, with 2 and 5 times them where the range is short;
    where these are fewer than two, round values evenly apart."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    times = (1, 2, 5) if high < 100.0 * low else (1,)
    every = max(1, (last - first) // 6)
    rounded = [float(f"{m}e{e}") for e in range(first, last + 1, every) for m in times]
    inside = [value for value in rounded if low * 0.999 <= value <= high * 1.001]
    return inside if len(inside) > 1 else ticks(low, high, count)


class _Axis:
    """Maps values to px between `start` and `end`."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool) -> None:
        low, high = min(values), max(values)
        if low == high:
            pad = abs(low) * 0.1 or 1.0
            low, high = (low / 1.5, high * 1.5) if log else (low - pad, high + pad)
        elif not log and start > end:  # a y axis: some air; zero where it is near
            pad = 0.06 * (high - low)
            low = 0.0 if 0.0 <= low < 0.4 * high else low - pad
            high += pad
        self.low, self.high, self.log = low, high, log
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self._start + (self._end - self._start) * (value - low) / (high - low)

    def ticks(self, count: int = 5) -> list[float]:
        return (log_ticks if self.log else ticks)(self.low, self.high, count)


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    x_label: str = "student updates",
    note: str = "",
    marks: Sequence[float] = (),
    level: float | None = None,
) -> str:
    """A <figure> of named lines (x, y); empty text where there is nothing to draw.

    Args: marks: x values with a vertical line, such as alarms. level: a y value to aim at.
    """
    drawn = {name: some for name, points in lines.items() if (some := thinned(points))}
    if not drawn:
        return ""
    ys = [y for points in drawn.values() for _, y in points]
    log = min(ys) > 0 and max(ys) / min(ys) > _LOG_RANGE
    if level is not None and (level > 0 or not log):
        ys.append(level)
    xs = [x for points in drawn.values() for x, _ in points]
    x_axis = _Axis(xs, _LEFT, WIDTH - _RIGHT, log=False)
    y_axis = _Axis(ys, HEIGHT - _BOTTOM, _TOP, log)
    parts = _grid(x_axis, y_axis, x_label)
    if level is not None and (level > 0 or not log):
        y = y_axis(level)
        parts.append(
            f'<line class="level" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
    for x in {m for m in marks if x_axis.low <= m <= x_axis.high}:
        parts.append(
            f'<line class="mark" x1="{x_axis(x):.1f}" x2="{x_axis(x):.1f}" y1="{_TOP}" '
            f'y2="{HEIGHT - _BOTTOM}"/>'
        )
    legend = []
    for index, (name, points) in enumerate(drawn.items()):
        parts.append(_line([(x_axis(x), y_axis(y)) for x, y in points], index % 6))
        legend.append(f'<li class="c{index % 6}"><b>{escape(name)}</b> {short(points[-1][1])}</li>')
    below = f"<p>{escape(note)}</p>" if note else ""
    return (
        f'<figure class="chart"><figcaption><h3>{escape(title)}</h3>{below}'
        f'<ul class="legend">{"".join(legend)}</ul></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str) -> list[str]:
    parts = []
    for value in y_axis.ticks():
        y = y_axis(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>'
        )
    for value in x_axis.ticks():
        parts.append(
            f'<text x="{x_axis(value):.1f}" y="{HEIGHT - _BOTTOM + 17}" text-anchor="middle">'
            f"{short(value)}</text>"
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    return parts


def _line(points: Points, colour: int) -> str:
    if len(points) == 1:
        return f'<circle class="c{colour}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="4"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = ""
    if len(points) <= 24:
        dots = "".join(
            f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in points
        )
    return f'<polyline class="c{colour}" points="{path}"/>{dots}'
