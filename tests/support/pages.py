"""The pages that ship beside the code, and the commands and links in them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CODE = re.compile(r"^(?: {4,}[^\n]*|```.*?^```)$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^    ((?:[A-Z_]+=\S+ )*(?:pip|stepdistill|accelerate) .*)$", re.MULTILINE)


def page(name: str) -> str:
    """Text of the page at that path from the root."""
    return (ROOT / name).read_text(encoding="utf-8")


NAMES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "*/README.md", "stepdistill/*/README.md", "tests/benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
README = page("README.md")


def commands(text: str) -> list[str]:
    """The indented commands of a page, each on one line."""
    return _COMMAND.findall(re.sub(r"\\\n\s*", "", text))


COMMANDS = [command for name in NAMES for command in commands(page(name))]


def links(text: str) -> list[str]:
    """Targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", _CODE.sub("", text))


def anchors(text: str) -> set[str]:
    """Names that a page's headings can be linked by, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", _CODE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
