"""The pages' `evaluate` and `compare` run as they stand, on an untrained demo teacher."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from support.pages import COMMANDS

from stepdistill import DistributionMatchingTrainer, TrainConfig, Tuning
from stepdistill.cli import main
from stepdistill.demo.data import load_digit_splits, write_image_folder
from stepdistill.demo.teacher import TeacherConfig, build_teacher


def command(name: str) -> list[str]:
    """The one indented command of that name, on one line."""
    (line,) = [c for c in COMMANDS if c.startswith(f"stepdistill {name} --")]
    return shlex.split(line)[1:]


@pytest.fixture
def demo(tmp_path, monkeypatch) -> Path:
    """A folder as `stepdistill demo` leaves it, its training left out."""
    folder = tmp_path / "demo"
    write_image_folder(load_digit_splits().heldout, folder / "data")
    (folder / "data" / "prompts.txt").write_text("a handwritten one\na handwritten two\n")
    build_teacher(TeacherConfig(), 0.0, 0.5).save_pretrained(folder / "teacher")
    trainer = DistributionMatchingTrainer(
        model=str(folder / "teacher"),
        args=TrainConfig(
            output_dir=str(folder / "dmd2_full_1step"),
            max_train_steps=1,
            disable_progress_bar=True,
            tuning=Tuning(student="full", fake="full"),
        ),
        train_dataset=["a handwritten one"],
        method="dmd2",
        method_config={"num_steps": 1, "critic_steps": 1, "guidance": 1.0},
    )
    trainer.train()
    trainer.export(folder / "dmd2_full_1step" / "pipeline")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.full
def test_evaluate_runs_as_its_page_says(demo, capsys) -> None:
    short = ["--num_images_per_prompt", "3", "--teacher_steps", "2", "--num_reference", "40"]
    main([*command("evaluate"), *short])
    assert "dmd2_full_1step" in capsys.readouterr().out
    for suffix in ("html", "png", "csv", "json"):
        assert (demo / "evaluation" / f"report.{suffix}").is_file()


@pytest.mark.full
@pytest.mark.usefixtures("forked_students")
def test_compare_runs_as_its_page_says(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--budget", "2steps", "--demo_data", "digits", "--demo_teacher_steps", "2"]
    short += ["--demo_pairs", "64", "--demo_noise_seeds", "1"]
    main([*command("compare"), *short])
    told = capsys.readouterr().out
    assert all(f"| {name} |" in told for name in ("consistency", "dmd2", "reflow"))
    assert "failed" not in told
