"""A table, written as HTML, Markdown and CSV; its texts are data, whatever they hold."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from .markdown import plain


@dataclass(frozen=True)
class Line:
    """A row of a table. kind: real, teacher, student, failed or nothing (its colour)."""

    kind: str
    cells: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Column headings and rows of as many texts."""

    columns: Sequence[str]
    lines: Sequence[Line]

    def html(self) -> str:
        """Rows turn into cards on a phone: data-name gives each cell its heading."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        rows = []
        for line in self.lines:
            cells = "".join(
                f'<td data-name="{escape(name)}">{escape(text)}</td>'
                for name, text in zip(self.columns, line.cells, strict=True)
            )
            rows.append(f'<tr class="{line.kind}">{cells}</tr>')
        body = "\n".join(rows)
        return (
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody>'
            "</table></div>"
        )

    def markdown(self) -> str:
        """A row whose cells are fewer than the columns is filled up with empty ones."""
        rows = [self.columns, *(line.cells for line in self.lines)]
        lines = ["| " + " | ".join(map(plain, row)) + " |" for row in rows]
        for index, row in enumerate(rows):
            lines[index] += " |" * (len(self.columns) - len(row))
        return "\n".join([lines[0], "|---" * len(self.columns) + "|", *lines[1:]])


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> None:
    """Args: names: the columns, where not those of the first row; missing values are empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names or list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)
