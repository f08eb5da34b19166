"""Inputs of the data room as data: (kind, input, what is expected).

Expected is the value that is read, or a pattern of the one line that refuses or leaves it out
(a compiled one). The kinds are the functions of test_data_inputs.py.
"""

from __future__ import annotations

import json
import re
from typing import Any

BOM = b"\xef\xbb\xbf"
DEEP = "[" * 100_000
HALF = "\\ud800"  # half a character, as JSON writes it

says = re.compile


def named(name: Any, text: Any = "a cat", **more: Any) -> bytes:
    """A line of metadata.jsonl."""
    return json.dumps({"file_name": name, "text": text, **more}).encode()


CAPTION = r"expected a caption \(valid text that is not blank\) or a list of them, got "
LABEL = r"expected a class label, 0 to 9, got "

INPUTS: tuple[tuple[str, Any, Any], ...] = (
    # ------------------------------------------------------------------ prompts, one a line
    ("prompts", b"a\n\n b \r\nc", ["a", "b", "c"]),
    ("prompts", BOM + "caf\u00e9\n\u732b".encode(), ["caf\u00e9", "\u732b"]),
    ("prompts", b"\n\n" + BOM + b"a", ["\ufeffa"]),  # elsewhere it is a character like others
    ("prompts", BOM, says(r"expected at least one prompt, got none")),
    ("prompts", b"", says(r"expected at least one prompt, got none")),
    ("prompts", b"a\rb\rc", says(r"p\.txt:1: expected lines that end with a line feed, got carri")),
    ("prompts", b"a\n\xed\xa0\x80\n", says(r"expected UTF-8 text, got .* in line 2 of .*p\.txt")),
    ("prompts", "a\nb".encode("utf-16"), says(r"expected UTF-8 text, got .* in line 1 of")),
    ("prompts", b"[" * 10_000, ["[" * 10_000]),
    # ------------------------------------------------------------------ prompts of a program
    ("list", ["a", 3, ""], ["a", 3, ""]),
    ("list", [["a", "b"]], [["a", "b"]]),
    ("list", ["a", None], says(rf"train_dataset: {CAPTION}None \(NoneType\), prompt 1\.")),
    ("list", [1.5], says(rf"train_dataset: {CAPTION}1\.5 \(float\), prompt 0\.")),
    ("list", [b"a"], says(rf"train_dataset: {CAPTION}b'a' \(bytes\), prompt 0\.")),
    ("list", [[]], says(rf"train_dataset: {CAPTION}\[\] \(list\), prompt 0\.")),
    ("list", ["\ud800"], says(r"train_dataset: .* got '\\ud800' \(str\), prompt 0\.")),
    # ------------------------------------------------------------------ class labels, one a line
    ("labels", b"3\n\n0\n 9\n", [3, 0, 9]),
    ("labels", BOM + b"3\n", [3]),
    ("labels", b"3\n10\n", says(rf"l\.txt:2: {LABEL}'10' \(str\)")),
    ("labels", b"3\n\n-1\n", says(rf"l\.txt:3: {LABEL}'-1' \(str\)")),
    ("labels", "\u00b2".encode(), says(rf"l\.txt:1: {LABEL}'\u00b2' \(str\)")),
    ("labels", b"9" * 5000, says(rf"l\.txt:1: {LABEL}'999")),
    ("labels", b"cat", says(rf"l\.txt:1: {LABEL}'cat' \(str\)")),
    ("labels", b"\n", says(r"expected one class label a line, got none")),
    ("labels", b"\xff", says(r"expected UTF-8 text, got .* in line 1")),
    # ------------------------------------------------------------------ metadata.jsonl
    ("jsonl", named("a.png"), [("a.png", "a cat")]),
    ("jsonl", BOM + named("a.png"), [("a.png", "a cat")]),
    ("jsonl", named("a.png", ["one", " two "]), [("a.png", ("one", "two"))]),
    ("jsonl", b'{"image": "a.png", "caption": "x"}', [("a.png", "x")]),
    ("jsonl", b'{"file_name": "a.png", "prompt": "x", "other": 3}', [("a.png", "x")]),
    ("jsonl", named("a.png", "caf\u00e9 \u732b"), [("a.png", "caf\u00e9 \u732b")]),
    ("jsonl", b"\n" + named("a.png", None), says(rf"jsonl:2: {CAPTION}None \(NoneType\)\. ")),
    ("jsonl", named("a.png", 3), says(rf"jsonl:1: {CAPTION}3 \(int\)\. Write one")),
    ("jsonl", named("a.png", True), says(rf"jsonl:1: {CAPTION}True \(bool\)")),
    ("jsonl", named("a.png", " "), says(rf"jsonl:1: {CAPTION}' ' \(str\)")),
    ("jsonl", named("a.png", []), says(rf"jsonl:1: {CAPTION}\[\] \(list\)")),
    ("jsonl", named("a.png", ["x", None]), says(rf"jsonl:1: {CAPTION}None \(NoneType\)")),
    ("jsonl", named("a.png", {"en": "x"}), says(rf"jsonl:1: {CAPTION}.*dict\)")),
    ("jsonl", named("a.png", "\ud800"), says(rf"jsonl:1: {CAPTION}'\\ud800' \(str\)")),
    ("jsonl", named("a.png") + b"\n" + DEEP.encode(), says(r"jsonl:2: .* nested too deep")),
    ("jsonl", b'{"file_name": "a.png", "text": ' + DEEP.encode(), says(r"jsonl:1: expected an ob")),
    ("jsonl", b'{"file_name": "a.png"}', says(r"jsonl:1: .*file_name and text, got columns \['f")),
    ("jsonl", b"3", says(r"jsonl:1: .*file_name and text, got 3 \(int\)")),
    ("jsonl", named("a\0.png"), says(r"jsonl:1: expected .*, got .*a.x00\.png")),
    ("jsonl", named("a" * 5000), says(r"jsonl:1: expected a file's name, got .*OSError")),
    ("jsonl", named("\ud800.png"), says(r"jsonl:1: expected a file's name, got .*UnicodeEnc")),
    ("jsonl", named(3), says(r"jsonl:1: expected an object with a file's name, got 3 \(int\)")),
    ("jsonl", named("no.png"), says(r"jsonl:1: expected every file to exist, got no .*no\.png")),
    ("jsonl", named("../x.png"), says(r"jsonl:1: expected files inside")),
    ("jsonl", named(""), says(r"jsonl:1: expected files inside")),
    ("jsonl", b"\xff\xfe", says(r"expected UTF-8 text, got .* in line 1 of .*jsonl")),
    # ------------------------------------------------------------------ metadata.csv
    ("csv", b"file_name,text\na.png,a cat\n", [("a.png", "a cat")]),
    ("csv", BOM + b"file_name,text\r\na.png,a cat\r\n", [("a.png", "a cat")]),
    ("csv", b'file_name,text\na.png,"a cat, oil\non it"\n', [("a.png", "a cat, oil\non it")]),
    ("csv", b"image,caption,n\nb.png,x,3\na.png,y,4\n", [("b.png", "x"), ("a.png", "y")]),
    ("csv", b"file_name,text\na.png,\n", says(rf"csv:2: {CAPTION}'' \(str\)")),
    ("csv", b"file_name,text\na.png\n", says(rf"csv:2: {CAPTION}None \(NoneType\)")),
    ("csv", b"file_name;text\na.png;x\n", says(r"csv:2: .*got columns \['file_name;text'\]")),
    ("csv", b"file_name,text\nno.png,x\n", says(r"csv:2: expected every file to exist")),
    ("csv", b'file_name,text\na.png,"x\n', says(r"csv.*: expected a table as UTF-8 .* end of")),
    ("csv", b"file_name,text\na.png,\xff\n", says(r"csv: expected a table as UTF-8 text")),
    ("csv", b"file_name,text\na.png," + b"x" * 200_000, says(r"csv.*: expected a table .* limit")),
    ("csv", b"file_name,text\n", says(r"expected images, got none")),
    # ------------------------------------------------------------------ a .txt beside each image
    ("txt", b"a cat\n", "a cat"),
    ("txt", BOM + b"a cat", "a cat"),
    ("txt", b"a cat,\nsitting", "a cat,\nsitting"),
    ("txt", b" \n", says(rf"a\.txt: {CAPTION}' \\n' \(str\)\. Write a caption")),
    ("txt", b"\xff", says(r"a\.txt: .*Write a caption as UTF-8 text")),
    ("txt", b"x" * (1 << 21), says(rf"a\.txt: {CAPTION}")),
    # ------------------------------------------------------------------ members of a tar
    ("tar .txt", b"a cat\n", {"prompt": "a cat"}),
    ("tar .txt", BOM + b"a cat", {"prompt": "a cat"}),
    ("tar .txt", b" ", says(rf"s\.tar:0 \(its prompt: {CAPTION}' ' \(str\)")),
    ("tar .txt", b"\xff", says(r"s\.tar:0 \(its prompt: 'utf-8'")),
    ("tar .json", b'{"text": "a cat"}', {"prompt": "a cat"}),
    ("tar .json", b'{"text": ["a", "b"]}', {"prompt": ("a", "b")}),
    ("tar .json", b'{"text": null}', says(rf"s\.tar:0 .*{CAPTION}None")),
    ("tar .json", b'{"text": 3}', says(rf"s\.tar:0 .*{CAPTION}3 \(int\)")),
    ("tar .json", f'{{"text": "{HALF}"}}'.encode(), says(rf"s\.tar:0 .*{CAPTION}'\\ud800'")),
    ("tar .json", DEEP.encode(), says(r"s\.tar:0 .*nested too deep")),
    ("tar .json", b"[1]", says(r"s\.tar:0 \(its prompt")),
    ("tar .json", b'{"caption": "x"}', says(r"s\.tar:0 \(its prompt: 'text'\)")),
    ("tar .cls", b"9\n", {"label": 9}),
    ("tar .cls", b"10", says(rf"s\.tar:0 \(its label: {LABEL}'10'")),
    ("tar .cls", b"cat", says(rf"s\.tar:0 \(its label: {LABEL}'cat'")),
    # ------------------------------------------------------------------ a column of a dataset
    ("rows", ["a", " b "], [{"prompt": "a"}, {"prompt": "b"}]),
    ("rows", [["a", "b"], ["c"]], [{"prompt": ("a", "b")}, {"prompt": ("c",)}]),
    ("rows", [None, "a"], says(rf"row 0 \(text: {CAPTION}None")),
    ("rows", [[], ["a"]], says(rf"row 0 \(text: {CAPTION}\[\]")),
    ("rows", [["a", None]], says(rf"row 0 \(text: {CAPTION}None")),
    ("rows", [3, 4], says(r"caption_column: expected a column of texts.* got 'text' of .*int64")),
    ("rows", [{"en": "a"}], says(r"caption_column: expected a column of texts.* got 'text' of ")),
    ("rows", [[1.5]], says(r"caption_column: expected a column of texts.* got 'text' of ")),
    ("row labels", [0, 9], [{"label": 0}, {"label": 9}]),
    ("row labels", [10], says(rf"row 0 \(text: {LABEL}10 \(int\)")),
    ("row labels", [-1], says(rf"row 0 \(text: {LABEL}-1 \(int\)")),
    ("row labels", [None, 3], says(rf"row 0 \(text: {LABEL}None")),
    ("row labels", [1.0], says(r"caption_column: expected a column of class labels")),
    # ------------------------------------------------------------------ folders of images
    ("folder", ["a.png", "._a.png", ".ipynb_checkpoints/a.png", ".b.png"], ["a.png"]),
    ("folder", ["@eaDir/a.png", "__MACOSX/a.png", "d/a.png"], ["d/a.png"]),
    ("folder", ["a.gif", "b.TIFF", "c.avif", "d.jfif"], ["a.gif", "b.TIFF", "c.avif", "d.jfif"]),
    ("folder", ["a.png", "b.heic", "d/c.jxl"], says(r"left out 2 pictures .*b\.heic, d/c\.jxl")),
    ("folder", ["a.png", "notes.txt", "c.tar"], ["a.png"]),
    ("label folder", ["3/a.png", "0/b.png"], [("0/b.png", 0), ("3/a.png", 3)]),
    ("label folder", ["3/a.png", ".ipynb_checkpoints/a.png"], [("3/a.png", 3)]),
    ("label folder", ["10/a.png"], says(rf"/10: {LABEL}'10' \(str\)\. Rename the folder")),
    ("label folder", ["99999999999/a.png"], says(rf"/99999999999: {LABEL}")),
    ("label folder", ["\u00b2/a.png"], says(r"expected sub-folders named by class label")),
    ("label folder", ["1/a.heic", "1/b.png"], says(r"left out 1 picture .*1/a\.heic")),
)  # fmt: skip

# Changes to a pair set's manifest: (keys, value).
PAIRS: tuple[tuple[tuple[str, ...], Any], ...] = (
    (("num_pairs",), "x"),
    (("num_pairs",), 0),
    (("num_pairs",), -2),
    (("num_pairs",), 2.5),
    (("num_pairs",), None),
    (("num_pairs",), 10**15),
    (("settings",), []),
    (("settings", "shape"), "ab"),
    (("settings", "shape"), [-2]),
    (("settings", "shape"), 2),
    (("settings", "times"), ["x"]),
    (("settings", "times"), [float("nan")]),
    (("settings", "seed"), None),
    (("settings", "batch_size"), "2"),
    (("settings", "shard_size"), 0),
    (("settings", "shard_size"), None),
    (("settings", "x0_dtype"), "float8"),
    (("settings", "unknown"), 1),
)
