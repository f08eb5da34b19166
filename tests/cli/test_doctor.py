"""`doctor`: what it tells, that it tells no secret, and that its self-check can fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepdistill.cli import doctor, main


def test_the_report_can_be_pasted(monkeypatch, capsys) -> None:
    """Every section, in Markdown; no secret, no folder of the user's, no other variable."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("MASTER_ADDR", "node17.cluster")
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--no-self_check"])
    told = capsys.readouterr().out
    assert ended.value.code == 0
    for section in ("versions", "devices", "launcher", "disk", "extras"):
        assert f"### {section}\n- " in told
    for fact in ("- torch: 2.", "- accelerate: ", "- NVIDIA driver: ", "- cpu: ", "GB free"):
        assert fact in told
    assert "- NCCL_DEBUG: INFO" in told
    for private in ("hf_", "node17", str(Path.home())):
        assert private not in told


def test_json_holds_the_same(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--json", "--no-self_check"])
    found = json.loads(capsys.readouterr().out)
    assert found["versions"] == doctor.versions()
    assert set(found["extras"]) >= {"demo", "eval", "rewards", "quantization", "datasets"}
    assert found["self-check"] == {}


def test_an_extra_that_is_missing_is_named(monkeypatch) -> None:
    class Nothing:
        name = "torch"

    monkeypatch.setattr(doctor.metadata, "distributions", lambda: [Nothing()])
    assert doctor.extras()["rewards"] == "missing lpips, torchvision"
    assert doctor.versions()["peft"] == "missing"


def test_a_failed_self_check_is_status_1_in_a_line(monkeypatch, capsys) -> None:
    def fails(device: str) -> None:
        raise RuntimeError(f"no kernel\non {device}")

    monkeypatch.setattr(doctor, "self_check", fails)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1
    assert "- cpu: failed: RuntimeError: no kernel on cpu" in capsys.readouterr().out


def test_the_self_check_passes_here() -> None:
    assert doctor.checked("cpu").startswith("passed in ")
