"""Options from YAML: what is said is read, what can't be meant is told with its line."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from stepdistill.config.files import parse_run_config
from stepdistill.config.yaml_files import read_yaml

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
WRONG = {
    "twice": ("a: 1\nb: 2\na: 3\n", r"c\.yaml:3: expected each option once, got 'a' again"),
    "twice inside": ("t:\n  rank: 1\n  rank: 2\n", r"c\.yaml:3: expected each option once"),
    "bomb": (LAUGHS, r"c\.yaml:\d+: expected at most 20000 values"),
    "within itself": ("a: &a [*a]\n", r"c\.yaml:1: expected at most 20000 values, 50 deep"),
    "mapping within itself": ("a: &a {b: *a}\n", r"c\.yaml:1: expected at most 20000 values"),
    "brackets": ("a: " + "[" * 100_000, r"c\.yaml: expected valid YAML"),
    "deep": ("a: " + "[" * 60 + "]" * 60, r"c\.yaml:1: expected at most 20000 values, 50 deep"),
    "large": ("# " + "x" * (1 << 20), r"c\.yaml: expected at most 1048576 bytes"),
    "list": ("- a\n", r"c\.yaml: expected a mapping of options, got list"),
    "number for a name": ("1: 2\n", r"c\.yaml: expected names of options, got 1"),
    "two documents": ("a: 1\n---\nb: 2\n", r"c\.yaml: expected valid YAML"),
    "python": ("a: !!python/name:os.system\n", r"c\.yaml: expected valid YAML"),
    "bytes": ("a: \udcff\n", r"c\.yaml: expected valid YAML"),
}


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


@pytest.mark.parametrize("name", WRONG)
def test_what_can_not_be_meant(tmp_path, name) -> None:
    text, line = WRONG[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=line):
        read_yaml(written(tmp_path, text))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("1.5", 1.5),
        ("3", 3),
        ("[1, a]", [1, "a"]),
    ],
)
def test_words_are_words(tmp_path, text, value) -> None:
    assert read_yaml(written(tmp_path, f"a: {text}\n")) == {"a": value}


def test_mixed_precision_no_is_no(tmp_path) -> None:
    from stepdistill.config.run import TrainConfig

    read = read_yaml(written(tmp_path, "mixed_precision: no\n"))
    assert TrainConfig(output_dir="x", **read).mixed_precision == "no"


def test_what_is_right_is_read(tmp_path) -> None:
    text = "\ufefft: &t {rank: 4}\nu: *t\nv:\n  <<: *t\n  alpha: 2\n"
    expected = {"t": {"rank": 4}, "u": {"rank": 4}, "v": {"rank": 4, "alpha": 2}}
    assert read_yaml(written(tmp_path, text)) == expected
    assert read_yaml(written(tmp_path, "")) == {}
    assert read_yaml(written(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 100_000, "expected KEY=VALUE or a JSON object"),
        ('{"a": ' * 100_000, "expected KEY=VALUE or a JSON object"),
        ('{"guidance": 1, "guidance": 2}', "expected each key once, got"),
        ('{"gan": {"weight_g": 1, "weight_g": 2}}', "expected each key once, got"),
    ],
    ids=["brackets", "objects", "twice", "twice inside"],
)
def test_json_of_a_flag_is_read_with_the_same_suspicion(text, line) -> None:
    with pytest.raises((ValueError, TypeError), match=line) as refused:
        parse_run_config(["--method", "vsd", "--method_config", text], prog="train")
    assert len(str(refused.value)) < 500
