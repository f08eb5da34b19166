"""What the demo's report shows, on its page, in its picture and in the terminal."""

# N images

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich import table as rich
from rich.console import Console
from rich.markup import escape

from stepdistill.reporting import page
from stepdistill.reporting.blocks import Block, Facts, Strip, Text, Verdicts
from stepdistill.reporting.charts import Chart, Curve
from stepdistill.reporting.pictures import ink
from stepdistill.reporting.style import COLOUR
from stepdistill.reporting.table import Line, Table

from .metrics import PREVIEWS_PER_CLASS, Row
from .verdict import Check

_DISTANCES = ("sampler", "Fréchet ↓", "pixel Fréchet ↓", "recall ↑")
_COST = ("network calls", "ms / image")
_SHORT = ("", "Fréchet ↓", "pixels ↓", "recall ↑")  # of the terminal: fits 80


@dataclass(frozen=True)
class Report:
    """All that the report shows: facts are (name, value) pairs, snippet is code to copy, pictures
    what a row's pictures show, note a line below them, right what a row's `accuracy` is, and the
    same in a word."""

    title: str
    rows: Sequence[Row]
    checks: Sequence[Check]
    snippet: str
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    num_images: int = 0
    num_seeds: int = 0
    pictures: str = ""
    note: str = ""
    right: tuple[str, str] = ("class accuracy", "class")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what `cells` gives."""
        return (*_DISTANCES, f"{self.right[0]} ↑", *_COST)

    @property
    def caption(self) -> str:
        """How the figures were taken, in one sentence."""
        return (
            f"Mean ± standard deviation over {self.num_seeds} noise seeds, each with "
            f"{self.num_images} generated images against real ones of the same prompts. Fréchet "
            "distance and recall use features of a small network trained on real images. The "
            "first row is the floor: other real images judged as if generated."
        )

    def page(self) -> page.Report:
        """The same for the report's files."""
        table = Table(self.columns, [Line(row.group, cells(row)) for row in self.rows])
        verdicts = Verdicts([(c.kind, c.word, c.claim, c.measured) for c in self.checks])
        sections: list[tuple[str, Sequence[Block]]] = [
            ("Aims", [verdicts]),
            ("Samples", [*(_strip(row, self.pictures) for row in self.rows), Text(self.note)]),
            ("Figures", [table, Text(self.caption)]),
            ("Use it", [Text(self.snippet, "pre")]),
            ("This run", [Facts(self.facts)]),
        ]
        return page.Report(self.title, sections, [_chart(self.rows), (table, verdicts)])


def cells(row: Row, recall_digits: int = 3) -> list[str]:
    """A row's texts in the order of `Report.columns`; a dash where there is nothing to measure."""
    time = row.seconds_per_image
    return [
        row.label,
        row.frechet.text(),
        row.frechet_pixels.text(),
        row.recall.text(f".{recall_digits}f"),
        f"{row.accuracy.mean:.3f}",
        "–" if row.network_calls is None else f"{row.network_calls:g}",
        "–" if time is None else f"{time * 1000:.2f}",
    ]


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Writes report.html (self-contained) and report.png into `folder`; returns both paths."""
    files = folder / "report.html", folder / "report.png"
    report.page().write(*files)
    return files


def print_report(report: Report, console: Console | None = None) -> None:
    """The same table, verdicts and snippet in the terminal."""
    console = console or Console()
    table = rich.Table(
        title=escape(report.title), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0)
    )
    for index, name in enumerate((*_SHORT, f"{report.right[1]} ↑", "calls", "ms/img")):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    style = {"real": "dim", "teacher": "", "student": "bold cyan"}
    for row in report.rows:
        table.add_row(
            *(escape(cell.replace(" ± ", "±")) for cell in cells(row, recall_digits=2)),
            style=style.get(row.group, ""),
        )
    console.print(table)
    console.print(report.caption, style="dim")
    for check in report.checks:
        colour = {"good": "green", "open": "yellow"}[check.kind]
        word = f"[{colour}]{check.word:>11}[/{colour}]"
        line = f"{word}  {escape(check.claim)}  [dim]{escape(check.measured)}[/dim]"
        console.print(line, highlight=False, soft_wrap=True)
    for name, value in report.facts:
        console.print(f"[dim]{escape(name)}:[/dim] {escape(value)}")
    console.print()
    console.print(report.snippet, markup=False, highlight=False, soft_wrap=True)


def _strip(row: Row, about: str) -> Strip:
    """A line for each preview of a class."""
    caption = f"Fréchet {row.frechet.mean:.2f} · recall {row.recall.mean:.2f}"
    images = [ink(image) for image in row.previews]
    lines = [images[i::PREVIEWS_PER_CLASS] for i in range(PREVIEWS_PER_CLASS)]
    return Strip(row.group, row.label, caption, lines, about=about)


def _chart(rows: Sequence[Row]) -> Chart:
    curves = []
    for group, marker in (("teacher", "o"), ("student", "D")):
        points = {r.steps: r.frechet for r in rows if r.group == group and r.steps}
        if points:
            at, values = zip(*sorted(points.items()), strict=True)
            means, stds = [v.mean for v in values], [v.std for v in values]
            base = group == "teacher"
            curves.append(Curve(group, at, means, stds, COLOUR[group], base, marker, above=base))
    floor = next(
        (("held-out floor", row.frechet.mean) for row in rows if row.group == "real"), None
    )
    title = "Fréchet distance against sampling steps (lower is better)"
    ticks = sorted({row.steps for row in rows if row.steps})
    return Chart(title, "steps = network calls per image", curves, floor, ticks)
