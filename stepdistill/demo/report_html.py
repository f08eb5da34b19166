"""report.html: one self-contained page that reads well on a wide screen and on a phone."""

from __future__ import annotations

import string
from html import escape
from pathlib import Path

from .metrics import PREVIEWS_PER_CLASS, Row
from .report import COLUMNS, Report, cells
from .report_images import data_uri, strip
from .verdict import Check

TEMPLATE = Path(__file__).with_name("report_template.html")


def render_html(report: Report) -> str:
    """The page's text; all pictures are data: addresses, nothing is fetched when it is opened."""
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(report.title),
        caption=escape(report.caption),
        checks="\n".join(map(_check, report.checks)),
        gallery="\n".join(map(_gallery_row, report.rows)),
        head="".join(f"<th>{escape(name)}</th>" for name in COLUMNS),
        body="\n".join(map(_table_row, report.rows)),
        facts="\n".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, value in report.facts
        ),
        snippet=escape(report.snippet),
    )


def _check(check: Check) -> str:
    kind = "good" if check.passed else "open" if check.aim else "bad"
    return (
        f'<li class="{kind}"><b>{escape(check.word)}</b>'
        f"<span>{escape(check.claim)}</span><em>{escape(check.measured)}</em></li>"
    )


def _gallery_row(row: Row) -> str:
    """One strip for each preview of a class: side by side where there is room, else stacked."""
    pictures = "".join(
        f'<img alt="{escape(row.label)}: digits zero to nine" src="'
        f'{data_uri(strip(part, columns=len(part)))}">'
        for part in (row.previews[i::PREVIEWS_PER_CLASS] for i in range(PREVIEWS_PER_CLASS))
    )
    return (
        f'<figure class="{row.group}"><figcaption><b>{escape(row.label)}</b>'
        f"<span>Fréchet {row.frechet.mean:.2f} · recall {row.recall.mean:.2f}</span>"
        f'</figcaption><div class="strips">{pictures}</div></figure>'
    )


def _table_row(row: Row) -> str:
    """A table line; data-name gives each cell its heading where the table turns into cards."""
    columns = "".join(
        f'<td data-name="{escape(name)}">{escape(text)}</td>'
        for name, text in zip(COLUMNS, cells(row), strict=True)
    )
    return f'<tr class="{row.group}">{columns}</tr>'
