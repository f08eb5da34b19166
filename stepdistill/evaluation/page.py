"""One self-contained HTML page: reads well on a wide screen and on a phone, fetches nothing."""

from __future__ import annotations

import base64
import io
import string
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

TEMPLATE = Path(__file__).with_name("page.html")
SMALL_PX = 32  # pictures of images below that size are shown with sharp pixels


@dataclass(frozen=True)
class Line:
    """A row of a table or gallery. kind: real, teacher, student or failed (its colour)."""

    kind: str
    cells: Sequence[str]


@dataclass(frozen=True)
class Strip:
    """A gallery row: pictures side by side where there is room, else stacked."""

    kind: str
    label: str
    caption: str
    pictures: Sequence[NDArray[np.uint8]]
    about: str = "samples"
    small: bool = False


def render(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The page's text. Args: sections: (heading, body), the body as HTML."""
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    bodies = "\n".join(f"<section><h2>{escape(h)}</h2>\n{body}\n</section>" for h, body in sections)
    return template.substitute(title=escape(title), sections=bodies)


def table(columns: Sequence[str], lines: Sequence[Line]) -> str:
    """A table whose rows turn into cards on a phone: data-name gives each cell its heading."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = []
    for line in lines:
        cells = "".join(
            f'<td data-name="{escape(name)}">{escape(text)}</td>'
            for name, text in zip(columns, line.cells, strict=True)
        )
        rows.append(f'<tr class="{line.kind}">{cells}</tr>')
    body = "\n".join(rows)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'
        "</div>"
    )


def gallery(strips: Sequence[Strip]) -> str:
    """Figures, one for each strip."""
    return "\n".join(map(_figure, strips))


def _figure(strip: Strip) -> str:
    small = ' class="small"' if strip.small else ""
    pictures = "".join(
        f'<img{small} alt="{escape(strip.label)}: {escape(strip.about)}" src="{data_uri(picture)}">'
        for picture in strip.pictures
    )
    return (
        f'<figure class="{strip.kind}"><figcaption><b>{escape(strip.label)}</b>'
        f"<span>{escape(strip.caption)}</span>"
        f'</figcaption><div class="strips">{pictures}</div></figure>'
    )


def verdicts(lines: Sequence[tuple[str, str, str, str]]) -> str:
    """A list of (good | open | bad, word, claim, measured)."""
    items = (
        f'<li class="{kind}"><b>{escape(word)}</b>'
        f"<span>{escape(claim)}</span><em>{escape(measured)}</em></li>"
        for kind, word, claim, measured in lines
    )
    return "<ul>\n" + "\n".join(items) + "\n</ul>"


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    items = (f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in pairs)
    return "<dl>\n" + "\n".join(items) + "\n</dl>"


def paragraph(text: str) -> str:
    """Small print."""
    return f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    """Code to copy."""
    return f"<pre>{escape(text)}</pre>"


def charts(drawn: Sequence[tuple[str, bytes]]) -> str:
    """Drawn pictures (what, PNG), side by side where there is room."""
    images = (f'<img alt="{escape(about)}" src="{_uri(png)}">' for about, png in drawn)
    return f'<div class="charts">{"".join(images)}</div>'


def data_uri(picture: NDArray[np.uint8]) -> str:
    """The picture as a PNG inside a data: address."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return _uri(buffer.getvalue())


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
