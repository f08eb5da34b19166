"""Made from its packages by one command, kept as a folder, loaded again; the demo about it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stepdistill.cli import main
from stepdistill.config.recipes import recipe_for
from stepdistill.demo.emoji import teacher as teacher_module
from stepdistill.demo.emoji import training
from stepdistill.demo.emoji.budget import Budget
from stepdistill.demo.emoji.captions import caption
from stepdistill.demo.emoji.data import SHIPPED
from stepdistill.demo.emoji.judge import Retrieval
from stepdistill.demo.emoji.subject import EmojiJudge, EmojiSubject
from stepdistill.demo.emoji.teacher import emoji_teacher, load_pictures, make_teacher
from stepdistill.demo.metrics import Row
from stepdistill.evaluation.samples import Samples
from stepdistill.export.secrets import local_paths
from stepdistill.reporting.values import Measured

from .test_emoji_data import packages  # noqa: F401

RUNG = {"steps": 50, "guidance": 1.0, "frechet": 2.0, "recall": 0.5, "ratio": 1.0}
MEASURED = {
    "ladder": [RUNG],
    "floor": 1.0,
    "obeyed": {"seen": 0.8, "held_out": 0.6},
    "real": 1.0,
}


@pytest.fixture(scope="module")
def folder(packages, tmp_path_factory):  # noqa: F811
    """A teacher of one batch a phase, made in two calls."""
    out, train_judge = tmp_path_factory.mktemp("emoji"), teacher_module.train_retrieval
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_module, "measure", lambda *_: MEASURED)
        patch.setattr(teacher_module, "train_retrieval", lambda e, seed: train_judge(e, 8, 8, seed))
        patch.setattr(training, "GRID_CAPTIONS", ("fruit",))
        budget = Budget(autoencoder=8, denoiser=64, decoder=8)
        assert make_teacher(packages, out, 0.0, budget) is None
        assert make_teacher(packages, out, 1e9, budget) == out / "teacher"
    return out / "teacher"


@pytest.mark.full
def test_the_teacher_is_a_stock_pipeline_in_half_precision_with_all_beside_it(folder) -> None:
    pipeline = emoji_teacher(folder)
    assert type(pipeline) is StableDiffusionPipeline
    assert pipeline.unet.dtype == torch.float32
    assert pipeline.vae.config.scaling_factor != 0.18215
    made = json.loads((folder / "made.json").read_text())
    assert made["spent"]["denoiser"]["pictures"] == 64
    names = {path.name for path in folder.iterdir()}
    assert {"fluent-MIT.txt", "noto-Apache-2.0.txt"} <= {
        path.name for path in (folder / "licences").iterdir()
    }
    assert {"pictures.zip", "licences", "held_out.json", "judge.safetensors"} <= names
    assert len([*folder.glob("*/*.safetensors")]) == 3
    configs = [*folder.rglob("*.json")]
    assert (folder / "unet" / "config.json") in configs
    assert not any(local_paths(json.loads(path.read_text())) for path in configs)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size < 13.4e6  # which leaves 1.6 MB for two thousand pictures
    assert "80% of seen combinations, 60% of held-out ones" in (folder / "README.md").read_text()


@pytest.mark.full
def test_its_pictures_come_with_what_they_show(folder) -> None:
    emoji = load_pictures(folder)
    assert emoji.pictures.shape == (1, 8, 64, 64, 3)
    assert emoji.entries[0].name == "red apple"


@pytest.mark.full
def test_the_demo_has_its_data_and_both_kinds_of_prompts(folder, tmp_path) -> None:
    subject = EmojiSubject(folder)
    subject.write_data(tmp_path / "data")
    prompts = (tmp_path / "data" / "prompts.txt").read_text().splitlines()
    assert {"red apple in noto style", "slice of pizza in fluent style"} <= set(prompts)
    assert any(text.startswith(("fruit", "prepared", "food and drink")) for text in prompts)
    made = subject.teacher(tmp_path / "teacher", None)
    assert (made.cached, made.record.steps) == (True, 1)
    assert (made.folder / "model_index.json").is_file()


def test_a_short_student_of_one_step_is_of_regression_alone(folder) -> None:
    subject, recipe = EmojiSubject(folder), recipe_for("dmd2", "full")
    for seconds, labels in ((100.0, ["regression"]), (3600.0, ["regression", "dmd2"])):
        trainings = recipe.with_first(partial(subject.first, seconds=seconds)).trainings(1)
        assert [training.label for training in trainings] == labels
        assert sum(training.share for training in trainings) == 1
    assert [training.label for training in recipe.trainings(4)] == ["dmd2"]


@pytest.mark.parametrize("seconds", [None, 100.0])
def test_a_smaller_student_is_half_as_wide_as_this_teacher(seconds) -> None:
    subject, slimflow = EmojiSubject(SHIPPED), recipe_for("slimflow", "full")
    first, *_ = slimflow.with_first(partial(subject.first, seconds=seconds)).trainings(1)
    widths = json.loads((SHIPPED / "unet" / "config.json").read_text())["block_out_channels"]
    made = first.settings["tuning"]["student_config"]["block_out_channels"]
    assert [2 * width for width in made] == widths
    digits = slimflow.trainings(1)[0].settings["tuning"]["student_config"]
    assert digits["block_out_channels"] != made


def test_another_demo_s_teacher_is_not_taken_for_it_and_an_older_one_is_replaced(
    folder, tmp_path
) -> None:
    subject, out = EmojiSubject(folder), tmp_path / "teacher"
    out.mkdir()
    with pytest.raises(ValueError, match=r"^output_dir: expected an empty folder or an earlier"):
        subject.teacher(out, None)
    out.rmdir()
    older = shutil.copytree(folder, tmp_path / "older")
    made = json.loads((older / "made.json").read_text())
    made["spent"]["denoiser"]["updates"] = 0
    (older / "made.json").write_text(json.dumps(made))
    assert EmojiSubject(older).teacher(out, None).record.steps == 0
    assert subject.teacher(out, None).record.steps == 1


def test_the_judge_scores_real_pictures_best_and_shows_both_kinds(folder) -> None:
    torch.manual_seed(0)
    emoji, net = load_pictures(folder), Retrieval(["red"]).eval().requires_grad_(False)
    judge = EmojiJudge(emoji, net, wide=40, narrow=8)
    floor = judge.floor((0, 1))
    noise = [Samples(torch.rand(48, 3, 64, 64) * 2 - 1, 4.8, 1.0)]
    worse = judge.score("noise", "student", 1, noise)
    assert judge.prompts[:8] == [*map(caption, judge.shown)]
    assert floor.frechet.mean < worse.frechet.mean
    assert floor.frechet_pixels.mean < worse.frechet_pixels.mean
    assert worse.seconds_per_image == pytest.approx(0.1)
    assert torch.equal(worse.previews[0], noise[0].images[0])
    assert torch.equal(worse.previews[1], noise[0].images[8])  # a column after the other


def test_rows_are_saved_with_their_pictures_in_colour(folder, tmp_path) -> None:
    judge = EmojiJudge(load_pictures(folder), Retrieval(["red"]), 40, 8)
    row = judge.floor((0, 1))
    Row.save_all([row], tmp_path / "rows.json")
    (loaded,) = Row.load_all(tmp_path / "rows.json")
    assert (loaded.frechet, loaded.label) == (row.frechet, row.label)
    assert loaded.previews.shape == row.previews.shape
    assert (loaded.previews - row.previews).abs().mean() < 0.05
    assert (tmp_path / "rows.json").stat().st_size < 2_000 * len(row.previews)


def test_a_missed_aim_is_no_failure(folder) -> None:
    row = EmojiJudge(load_pictures(folder), Retrieval(["red"]), 40, 8).floor((0,))
    rows = [
        replace(row, group=group, steps=steps, frechet=frechet)
        for group, steps, frechet in (
            ("teacher", 50, Measured(2.0, 0.0)),
            ("student", 1, Measured(4.0, 0.0)),
        )
    ]
    checks = EmojiSubject(folder).checks(rows)
    assert [(check.kind, check.measured) for check in checks] == [("open", "2.00 ×")]
    assert EmojiSubject(folder).checks(rows[:1]) == []


def test_no_teacher_says_how_to_make_one(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected the emoji teacher.*demo teacher"):
        emoji_teacher(tmp_path)
    with pytest.raises(SystemExit, match=r"^error: .*expected the emoji teacher"):
        main(["demo", "--data", "emoji", "--teacher", str(tmp_path)])


def test_the_command_makes_it_with_its_budget(tmp_path, monkeypatch, capsys) -> None:
    calls = []
    monkeypatch.setattr(teacher_module, "make_teacher", lambda *args: calls.append(args))
    main(["demo", "teacher", "--source", "p", "--output_dir", "o", "--denoiser_pictures", "5"])
    assert calls[0][2] == float("inf")
    assert calls[0][3] == Budget(denoiser=5)
    assert "goes on from here" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: .*source"):
        main(["demo", "teacher"])
