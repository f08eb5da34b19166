"""A record leads to code that the user has named before, and to no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepdistill.config.files import parse_run_config
from stepdistill.config.method_names import resolve_method
from stepdistill.methods import METHODS
from stepdistill.storage.own_code import recorded

SOURCE = """from stepdistill.methods.dmd2 import DMD2
class SiD(DMD2):
    name = "sid_of_{}"
"""


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """FILE.py:CLASS of a method, and a user's folder that knows no file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(METHODS, "files", {})
    (tmp_path / "mine.py").write_text(SOURCE.format(tmp_path.name))
    return f"{tmp_path}/mine.py:SiD"


def facts_of(text: str) -> dict[str, object]:
    """What a run of that method records."""
    name, _ = resolve_method(text)
    return {"method_file": METHODS.files[name]}


def test_a_run_names_a_method_of_a_file(text: str) -> None:
    flags = "--pretrained_model_name_or_path me/x --method_config.critic_steps 3"
    run = parse_run_config(["--method", text, *flags.split()])
    assert run.method == text
    assert run.method_config["critic_steps"] == 3


def test_a_record_finds_what_was_named(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(text)
    monkeypatch.setattr(METHODS, "files", {})  # another process
    recorded(METHODS, "method", facts, Path("run.json"))
    assert len(METHODS.files) == 1
    recorded(METHODS, "method", {}, Path("run.json"))  # a method of the package


def test_a_record_of_elsewhere_runs_nothing(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = facts_of(text)
    monkeypatch.setattr(METHODS, "files", {})
    monkeypatch.setenv("XDG_CACHE_HOME", text + "another user")
    with pytest.raises(ValueError, match=r"never named here.*stepdistill list --method .*mine.py"):
        recorded(METHODS, "method", facts, Path("run.json"))
    assert not METHODS.files


def test_a_file_that_is_gone_or_changed_is_told(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, file = facts_of(text), Path(text.rpartition(":")[0])
    file.write_text(file.read_text() + "# mended")
    with pytest.raises(ValueError, match="never named here"):
        recorded(METHODS, "method", facts, Path("run.json"))
    monkeypatch.setattr(METHODS, "files", {})
    resolve_method(text)
    with pytest.warns(UserWarning, match="has changed since the run began"):
        recorded(METHODS, "method", facts, Path("run.json"))
    file.unlink()
    with pytest.raises(ValueError, match=r"expected the file .* got none there. Put it back"):
        recorded(METHODS, "method", facts, Path("run.json"))
