"""Names from elsewhere stand in Markdown as they are, by a parser's own reading."""

from __future__ import annotations

from html import unescape

import pytest
from markdown_it import MarkdownIt

from stepdistill.reporting.markdown import code, plain

HOSTILE = [
    "x` | <script>alert(1)</script>",
    "``` two `` and ``` three",
    "a*b*c _d_ **e** ~~f~~ $g$",
    "[click](javascript:alert(1)) ![i](http://e/x.png)",
    "<img src=x onerror=alert(1)> &lt; &amp;",
    "end\\",
    "\\| \\` \\",
    "# head",
    "> quote",
    "- item",
    "1. item",
    "12) item",
    "--- ---",
    "===",
    "+ item",
    "two\n\n# lines\n---\nbase_model: x",
    "lora_guidance 2.10 ± 0.14 (0.85)",
]
PARSER = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_is_read_back_as_it_was(text) -> None:
    for line, before, after in (
        (f"# {plain(text)}", "<h1>", "</h1>\n"),
        (f"x {plain(text)} y", "<p>x ", " y</p>\n"),
        (f"- {plain(text)}", "<ul>\n<li>", "</li>\n</ul>\n"),
    ):
        html = PARSER.render(line)
        assert (html[: len(before)], html[-len(after) :]) == (before, after)
        shown = html[len(before) : -len(after)]
        assert "<" not in shown
        assert unescape(shown) == one_line(text)


@pytest.mark.parametrize("text", HOSTILE)
def test_in_typewriter_letters_too(text) -> None:
    shown = PARSER.render(code(text)).removeprefix("<p><code>").removesuffix("</code></p>\n")
    assert "<" not in shown
    assert unescape(shown) == one_line(text)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("form", [plain, code])
def test_a_text_is_one_cell_of_a_table(text, form) -> None:
    html = PARSER.render(f"| a | b |\n|---|---|\n| {form(text)} | end |\n")
    cells = [part.partition("</td>")[0] for part in html.split("<td>")[1:]]
    assert len(cells) == 2
    assert cells[1] == "end"
    shown = cells[0].removeprefix("<code>").removesuffix("</code>")
    assert unescape(shown) == one_line(text)


def test_what_needs_no_care_gets_none() -> None:
    for text in ("lora_guidance, 2 steps (0.85)", "2.10 ± 0.14 (0.85)", "-5", "+0.3"):
        assert plain(text) == text
    assert code("me/my_model-2.safetensors") == "`me/my_model-2.safetensors`"
