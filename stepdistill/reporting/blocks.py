"""What a page is made of: strips of pictures, verdicts, facts and texts, each as its own HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from .pictures import Picture, contact, img, png

SMALL_PX = 32  # pictures of images below that size are shown with sharp pixels


class Block(Protocol):
    """Part of a section."""

    def html(self) -> str:
        """It, its texts escaped."""
        ...


@dataclass(frozen=True)
class Strip:
    """Pictures of one system. kind: real, teacher or student (its colour); lines: side by side
    where there is room, else below each other; about: what they show."""

    kind: str
    label: str
    caption: str
    lines: Sequence[Sequence[Picture]]
    about: str = "samples"

    def html(self) -> str:
        """A figure with a picture for each line."""
        sheets = [contact(line) for line in self.lines]
        tiny = ' class="tiny"' if sheets and len(sheets[0]) < SMALL_PX else ""
        pictures = "".join(img(png(one), f"{self.label}: {self.about}", tiny) for one in sheets)
        return (
            f'<figure class="strip {self.kind}"><figcaption><b>{escape(self.label)}</b>'
            f"<span>{escape(self.caption)}</span>"
            f'</figcaption><div class="lines">{pictures}</div></figure>'
        )


@dataclass(frozen=True)
class Verdicts:
    """A list of (good | open | bad or nothing, word, claim, measured)."""

    lines: Sequence[tuple[str, str, str, str]]

    def html(self) -> str:
        """See Block."""
        items = (
            f'<li class="{kind}"><b>{escape(word)}</b>'
            f"<span>{escape(claim)}</span><em>{escape(measured)}</em></li>"
            for kind, word, claim, measured in self.lines
        )
        return '<ul class="verdicts">\n' + "\n".join(items) + "\n</ul>"


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    pairs: Sequence[tuple[str, str]]

    def html(self) -> str:
        """See Block."""
        items = (f"<div><dt>{escape(n)}</dt><dd>{escape(v)}</dd></div>" for n, v in self.pairs)
        return "<dl>\n" + "\n".join(items) + "\n</dl>"


@dataclass(frozen=True)
class Text:
    """Small print, or (tag "pre") code to copy."""

    text: str
    tag: str = "p"

    def html(self) -> str:
        """See Block."""
        return f"<{self.tag}>{escape(self.text)}</{self.tag}>"
