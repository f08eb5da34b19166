"""Texts from elsewhere (names of folders, prompts, teachers) inside Markdown: shown as they are.

Every character that Markdown or HTML would act on is escaped, and a line break is a space.
"""

from __future__ import annotations

import re

_ACTIVE = re.compile(r"[\\`*|~$]|\](?=\()|(?<![^\W_])_|_(?![^\W_])")  # _ does nothing within a word
# What begins a heading, a quote, a rule or a list; 2.10 and -5 begin none.
_FIRST = re.compile(r"^(?=[#>=]|[+-](?:[\s+-]|$))|^(\d{1,9})(?=[.)](?:\s|$))")


def plain(text: object) -> str:
    """A text within a line, or a table's cell."""
    line = " ".join(str(text).split())
    escaped = line.replace("&", "&amp;").replace("<", "&lt;")
    return _FIRST.sub(r"\1\\", _ACTIVE.sub(r"\\\g<0>", escaped))


def code(text: object) -> str:
    """A text in typewriter letters; a name without a backtick or a bar looks as it is written."""
    line = " ".join(str(text).split())
    if "`" in line or "|" in line:  # no fence is safe in every table
        return f"<code>{plain(line)}</code>"
    return f"`{line}`"
