"""`stepdistill optimise_latent`: losses of the command line, and what is wrong before weights."""

from __future__ import annotations

import json

import pytest
import torch
from support.runs import build_trainer, teacher_dir

from stepdistill.cli import main
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.export.optimise import Steering, pairs, read_losses
from stepdistill.export.pipeline import export_pipeline
from stepdistill.reporting.sound import read_wav, write_wav

FACTS = {"model": "base", "method": "dmd2", "step": 1, "seed": 0}


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    teacher = teacher_dir("ace_step", tmp_path_factory)
    folder = tmp_path_factory.mktemp("export")
    trainer = build_trainer("dmd2", teacher, "lora", folder / "run")
    grid = uniform_grid(2, trainer.family.shift)
    spec = SamplerSpec(grid, "ode", trained_times=grid)
    return export_pipeline(trainer.family, trainer.bank, spec, folder / "out", FACTS, verify=False)


def refused(*command: object) -> str:
    with pytest.raises(SystemExit, match=r"^error: ") as ended:
        main(["optimise_latent", *map(str, command)])
    return str(ended.value)


@pytest.mark.full
def test_a_sound_is_inpainted(export, tmp_path) -> None:
    """The same seed gives the same folder; a loss of the user's own counts beside."""
    target = torch.randn(1, 128).mul(0.3).clamp(-1, 1)
    write_wav(tmp_path / "target.wav", target, 64)
    (tmp_path / "own.py").write_text("def quiet(waves, rate):\n    return waves.square().mean()\n")
    out = tmp_path / "made"
    command = [
        "optimise_latent", export, "--prompt", "a bell", "--target", tmp_path / "target.wav",
        "--keep", "0:1", "--loss", f"{tmp_path / 'own.py'}:quiet", "--weights", "own:0.1",
        "--iterations", 6, "--output_dir", out,
    ]  # fmt: skip
    main([*map(str, command)])
    made = json.loads((out / "optimised.json").read_text())
    assert made["losses"] == {"keep": 1.0, "own": 0.1}
    assert made["lowest"] < made["history"][0]
    assert len(made["history"]) == 7
    page = (out / "report.html").read_text()
    assert (page.count("<audio"), page.count("<img")) == (2, 2)
    first = {name: read_wav(out / f"{name}.wav", 64, 1) for name in ("before", "after")}
    assert not torch.equal(first["before"], first["after"])
    main([*map(str, command)])
    assert torch.equal(read_wav(out / "after.wav", 64, 1), first["after"])


def test_bad_input_is_said_before_weights(export, tmp_path, monkeypatch) -> None:
    def read_weights(*_args, **_kwargs):
        raise AssertionError("a weight was about to be loaded")

    monkeypatch.setattr("stepdistill.export.optimise.load_stock", read_weights)
    write_wav(tmp_path / "a.wav", torch.zeros(1, 800), 8000)
    begun = (export, "--prompt", "a bell")
    told = refused(*begun, "--target", tmp_path / "a.wav", "--keep", "0:1")
    assert "sound at 64 Hz, as the model's, got 8000 Hz" in told
    assert "expected something to steer by" in refused(*begun)
    assert "a target beside keep" in refused(*begun, "--keep", "0:1")
    assert "two values with a colon" in refused(*begun, "--intensity", "loud")
    assert "Hz above 0" in refused(*begun, "--centroid", "0:-5")
    assert "expected at most the 2" in refused(*begun, "--structure", "AB", "--surrogate_steps", 3)
    assert "weights: expected one of" in refused(*begun, "--structure", "AB", "--weights", "keep:1")
    assert "file that is there" in refused(*begun, "--loss", "nowhere.py:f")
    record = json.loads((export / "distillation.json").read_text())
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "distillation.json").write_text(
        json.dumps({**record, "output": "images"})
    )
    assert "an export that makes sound" in refused(
        tmp_path / "images", "--prompt", "a bell", "--structure", "AB"
    )


def test_losses_by_their_options(tmp_path) -> None:
    write_wav(tmp_path / "t.wav", torch.zeros(1, 128), 64)
    asked = Steering(
        target=str(tmp_path / "t.wav"), continue_seconds=0.5, intensity=["0:-20", "1:-30"],
        centroid=["0:10"], structure="AB", weights=["structure:2"],
    )  # fmt: skip
    losses = read_losses(asked, 64, 1)
    assert [*losses] == ["continue", "intensity", "centroid", "structure"]
    assert losses["structure"][0] == 2.0
    assert pairs("keep", ["0:1.5", "3:4"]) == [(0.0, 1.5), (3.0, 4.0)]
    too_long = Steering(target=str(tmp_path / "t.wav"), continue_seconds=9.0)
    with pytest.raises(ValueError, match="at most the 2 s of the target"):
        read_losses(too_long, 64, 1)
