"""Chains of commands: one after another, in one process or several, a failure told as it said."""

from __future__ import annotations

import sys
import time

import pytest

from stepdistill.cli._chains import Chain, Stage
from stepdistill.core.stopping import PARENT


def finished(chain: Chain) -> None:
    while not chain.poll():
        time.sleep(0.05)


def test_a_command_is_started_alone_or_by_torchrun() -> None:
    alone, shared = Stage("pairs", ["pairs", "x"]), Stage("pairs", ["pairs", "x"], processes=2)
    assert alone.words == [sys.executable, "-m", "stepdistill.cli", "pairs", "x"]
    assert shared.words[-4:] == ["-m", "stepdistill.cli", "pairs", "x"]
    assert shared.words[2] == "torch.distributed.run"
    assert shared.words[shared.words.index("--nproc_per_node") + 1] == "2"


@pytest.mark.full
def test_stages_follow_each_other_and_a_failure_says_its_last_lines(tmp_path) -> None:
    output = tmp_path / "output.txt"
    finished(Chain(output, [Stage("one", ["list"]), Stage("two", ["recipes"])]))
    said = output.read_text()
    assert "dmd2" in said
    assert "flux-dmd2-lora" in said
    with pytest.raises(RuntimeError, match=r"(?s)one failed:.*no_such_command"):
        finished(Chain(output, [Stage("one", ["no_such_command"]), Stage("two", ["list"])]))


@pytest.mark.full
def test_several_processes_share_a_stage(tmp_path, monkeypatch) -> None:
    """torchrun stands between them and this process, so they watch it instead of this one."""
    (tmp_path / "told.py").write_text(
        f"import os; print(os.environ.get({PARENT!r}), os.environ['WORLD_SIZE'])"
    )
    shared = Stage("both", [], processes=2).words
    monkeypatch.setattr(Stage, "words", [*shared[:-1], "told"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(PARENT, "1")
    output = tmp_path / "output.txt"
    finished(Chain(output, [Stage("both", [], processes=2)]))
    assert output.read_text().count("None 2") == 2
