"""Made from its packages by one command, kept as a folder, loaded again."""

from __future__ import annotations

import json

import pytest
import torch

from stepdistill.cli import main
from stepdistill.demo.emoji import teacher as teacher_module
from stepdistill.demo.emoji import training
from stepdistill.demo.emoji.teacher import emoji_teacher, make_teacher
from stepdistill.demo.emoji.training import Budget

from .test_emoji_data import packages  # noqa: F401


def test_a_teacher_is_made_in_several_calls_and_loads_as_a_stock_pipeline(
    packages,  # noqa: F811
    tmp_path,
    monkeypatch,
) -> None:
    rung = {"steps": 50, "guidance": 1.0, "frechet": 2.0, "recall": 0.5, "ratio": 1.0}
    measured = {"ladder": [rung], "floor": 1.0, "obeyed": {"seen": 0.8, "held_out": 0.6}, "real": 1}
    monkeypatch.setattr(teacher_module, "measure", lambda *_: measured)
    small = teacher_module.train_retrieval
    monkeypatch.setattr(teacher_module, "train_retrieval", lambda e, seed: small(e, 8, 8, seed))
    monkeypatch.setattr(training, "GRID_CAPTIONS", ("fruit",))
    budget = Budget(autoencoder=8, denoiser=64, decoder=8)
    assert make_teacher(packages, tmp_path, 0.0, budget) is None
    folder = make_teacher(packages, tmp_path, 1e9, budget)
    assert folder == tmp_path / "teacher"
    pipeline = emoji_teacher(folder)
    assert pipeline.unet.dtype == torch.float32
    assert pipeline.vae.config.scaling_factor != 0.18215
    made = json.loads((folder / "made.json").read_text())
    assert made["spent"]["denoiser"]["pictures"] == 64
    names = {path.name for path in folder.iterdir()}
    assert {"pictures.zip", "licences", "held_out.json", "judge.safetensors", "README.md"} <= names
    weights = [*folder.glob("*/*.safetensors")]
    assert len(weights) == 3
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 14e6
    assert "80% of seen combinations, 60% of held-out ones" in (folder / "README.md").read_text()


def test_no_teacher_says_how_to_make_one(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the emoji teacher.*demo teacher"):
        emoji_teacher(tmp_path)


def test_the_command_makes_it_with_its_budget(tmp_path, monkeypatch, capsys) -> None:
    calls = []
    monkeypatch.setattr(teacher_module, "make_teacher", lambda *args: calls.append(args))
    main(["demo", "teacher", "--source", "p", "--output_dir", "o", "--denoiser_pictures", "5"])
    assert calls[0][2] == float("inf")
    assert calls[0][3] == Budget(denoiser=5)
    assert "goes on from here" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: .*source"):
        main(["demo", "teacher"])
