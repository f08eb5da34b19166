"""Captions of one picture at several widths, from a group of pictures to its full name.

A full name has one picture, so nothing is left to draw; "fruit" has many. A teacher that is
trained on both knows distributions and still does what a narrow caption says. Drawings of several
vendors share a caption unless it names the style.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

TONES = {
    "1f3fb": "light",
    "1f3fc": "medium light",
    "1f3fd": "medium",
    "1f3fe": "medium dark",
    "1f3ff": "dark",
}
STYLES = ("fluent", "noto")
WIDTHS = {"group": 0.1, "subgroup": 0.2, "words": 0.25, "name": 0.45}  # share in training
TELL_TONE = {"group": 0.35, "subgroup": 0.35, "words": 0.5, "name": 0.7}
TELL_STYLE = 0.5
FULL_SHARE_AT_LAST = 0.35  # of captions in the denoiser's final part, on top of WIDTHS' share
_FILLERS = {"a", "and", "for", "in", "of", "on", "or", "over", "sign", "symbol", "the", "with"}


@dataclass(frozen=True)
class Entry:
    """What a picture shows. base: code points without the tone; tone: one of TONES' names."""

    base: str
    name: str
    group: str
    subgroup: str
    tone: str | None
    style: str

    @property
    def key(self) -> str:
        """One line that names the picture; the list of held-out combinations holds these."""
        return f"{self.base} {self.tone or 'no tone'} {self.style}"


def plain(text: str) -> str:
    """Lower-case words and nothing else: "Food & Drink" is "food and drink"."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower().replace("&", " and ")))


def plain_subgroup(text: str) -> str:
    """The subgroup as a person would say it: "food-fruit" is "fruit"."""
    return plain(re.sub(r"^(food|animal|plant|place)-(?!other)", "", text.lower()))


def caption(entry: Entry, width: str = "name", tone: bool = True, style: bool = True) -> str:
    """The caption of an entry. Args: width: a field of Entry; tone, style: told where known."""
    return _completed(entry, getattr(entry, width), tone, style)


def random_caption(entry: Entry, draw: random.Random, full_share: float = 0.0) -> str:
    """A caption of a width, with tone and style or without, as training draws them.

    Args: full_share: how often it is the full caption of this one picture instead.
    """
    if full_share and draw.random() < full_share:
        return caption(entry)
    width = draw.choices([*WIDTHS], [*WIDTHS.values()])[0]
    tone, style = draw.random() < TELL_TONE[width], draw.random() < TELL_STYLE
    if width != "words":
        return caption(entry, width, tone, style)
    words = [word for word in entry.name.split() if word not in _FILLERS] or [entry.name]
    chosen = sorted(draw.sample(range(len(words)), min(len(words), draw.choice((1, 1, 2)))))
    return _completed(entry, " ".join(words[k] for k in chosen), tone, style)


def _completed(entry: Entry, text: str, tone: bool, style: bool) -> str:
    tone_text = f" with {entry.tone} skin" if tone and entry.tone else ""
    return f"{text}{tone_text}{f' in {entry.style} style' if style else ''}"
