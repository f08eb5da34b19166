"""One self-contained HTML page: reads well on a wide screen and on a phone, fetches nothing.

A Report is sections of blocks, each of which knows its own HTML; its strips and panels also make
one PNG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from .blocks import Block, Strip, Verdicts
from .charts import Chart
from .pictures import img
from .style import STYLE
from .table import Table


@dataclass(frozen=True)
class Charts:
    """Drawn charts, side by side where there is room."""

    charts: Sequence[Chart]

    def html(self) -> str:
        """See Block."""
        from .plots import chart_png  # the plotting library is an extra

        drawn = (img(chart_png(one), one.about or one.title) for one in self.charts)
        return f'<div class="charts">{"".join(drawn)}</div>'


@dataclass(frozen=True)
class Report:
    """All that a page shows. sections: (heading, blocks); panels: what the picture shows below the
    strips, side by side: charts, or a table with the verdicts on it."""

    title: str
    sections: Sequence[tuple[str, Sequence[Block]]]
    panels: Sequence[Chart | tuple[Table, Verdicts]] = field(default_factory=tuple)

    def html(self) -> str:
        """The page's text."""
        bodies = (
            f"<section><h2>{escape(heading)}</h2>\n{''.join(b.html() for b in blocks)}\n</section>"
            for heading, blocks in self.sections
        )
        return page(self.title, f"<h1>{escape(self.title)}</h1>\n" + "\n".join(bodies))

    def write(self, html: Path, picture: Path) -> None:
        """Both files; the PNG shows the strips below each other, then the panels."""
        from .plots import save_page

        html.parent.mkdir(parents=True, exist_ok=True)
        strips = [b for _, blocks in self.sections for b in blocks if isinstance(b, Strip)]
        save_page(picture, self.title, [s for s in strips if s.lines], self.panels)
        html.write_text(self.html(), encoding="utf-8")


def page(title: str, body: str, head: str = "") -> str:
    """A whole page. Args: body, head: HTML, the latter at the end of the page's head."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{head}</head>\n"
        f"<body>{body}</body></html>\n"
    )
