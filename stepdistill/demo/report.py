"""The demo's report: one plain record, written as HTML, as PNG and as a terminal table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stepdistill.evaluation.samples import Spread

from .metrics import Row
from .verdict import Check

COLUMNS = (
    "sampler",
    "Fréchet ↓",
    "pixel Fréchet ↓",
    "recall ↑",
    "class accuracy",
    "network calls",
    "ms / image",
)
TERMINAL_COLUMNS = ("", "Fréchet", "pixels", "recall", "class", "calls", "ms/img")  # fits 80


@dataclass(frozen=True)
class Report:
    """All that the report shows: facts are (name, value) pairs, snippet is code to copy."""

    title: str
    rows: Sequence[Row]
    checks: Sequence[Check]
    snippet: str
    facts: Sequence[tuple[str, str]] = field(default_factory=tuple)
    num_images: int = 0
    num_seeds: int = 0

    @property
    def caption(self) -> str:
        """How the figures were taken, in one sentence."""
        return (
            f"Mean ± standard deviation over {self.num_seeds} noise seeds, each with "
            f"{self.num_images} generated images against {self.num_images} held-out real ones of "
            "the same classes. Fréchet distance and recall use features of a small classifier "
            "trained on the real training images. The first row is the floor: real training "
            "images judged as if generated."
        )


def cells(row: Row, recall_digits: int = 3) -> list[str]:
    """A row's texts in the order of COLUMNS; a dash where there is nothing to measure."""
    time = row.seconds_per_image
    return [
        row.label,
        _spread(row.frechet, 2),
        _spread(row.frechet_pixels, 2),
        _spread(row.recall, recall_digits),
        f"{row.accuracy.mean:.3f}",
        "–" if row.network_calls is None else f"{row.network_calls:g}",
        "–" if time is None else f"{time * 1000:.2f}",
    ]


def write_report(report: Report, folder: Path) -> tuple[Path, Path]:
    """Writes report.html (self-contained) and report.png into `folder`; returns both paths."""
    from .report_html import render_html
    from .report_png import save_png

    folder.mkdir(parents=True, exist_ok=True)
    html_path, png_path = folder / "report.html", folder / "report.png"
    save_png(report, png_path)
    html_path.write_text(render_html(report), encoding="utf-8")
    return html_path, png_path


def print_report(report: Report, console: Console | None = None) -> None:
    """The same table, verdicts and snippet in the terminal."""
    console = console or Console()
    table = Table(
        title=report.title, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0)
    )
    for index, name in enumerate(TERMINAL_COLUMNS):
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
        colour = "green" if check.passed else "yellow" if check.aim else "red"
        word = f"[{colour}]{check.word:>11}[/{colour}]"
        line = f"{word}  {escape(check.claim)}  [dim]{escape(check.measured)}[/dim]"
        console.print(line, highlight=False, soft_wrap=True)
    for name, value in report.facts:
        console.print(f"[dim]{escape(name)}:[/dim] {escape(value)}")
    console.print()
    console.print(report.snippet, markup=False, highlight=False, soft_wrap=True)


def _spread(value: Spread, digits: int) -> str:
    return f"{value.mean:.{digits}f} ± {value.std:.{digits}f}"
