"""The best checkpoint is kept by a named metric: pruning leaves it, and no kill loses it."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from support.runs import build_trainer, teacher_dir

from stepdistill.training.best import Best, read_best, write_best
from stepdistill.training.checkpoint import list_checkpoints, named_checkpoint, prune
from stepdistill.training.validation import Validation, Validator
from stepdistill.training.whole import fault_of, write_folder


def make(folder, *steps: int) -> None:
    for step in steps:
        write_folder(folder / f"checkpoint-{step}", {}, {"s": {"n": step}})


def names(folder) -> list[str]:
    return [p.name for p in list_checkpoints(folder)]


def test_pruning_leaves_the_best_and_does_not_count_it(tmp_path) -> None:
    make(tmp_path, 1, 2, 3, 4)
    write_best(tmp_path, Best(1, "teacher_rmse", "min", 0.3))
    prune(tmp_path / "checkpoint-4", 2)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]


def test_the_best_is_found_by_name(tmp_path) -> None:
    make(tmp_path, 1, 2)
    with pytest.raises(ValueError, match=r"expected \"best\".*got 'best'"):
        named_checkpoint(tmp_path, "best")
    write_best(tmp_path, Best(1, "teacher_rmse", "min", 0.3))
    assert named_checkpoint(tmp_path, "best") == tmp_path / "checkpoint-1"
    assert named_checkpoint(tmp_path, "checkpoint-2") == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("name", ["checkpoint-3", "..", "../checkpoint-1", "/etc"])
def test_a_name_that_is_no_checkpoint_is_refused(tmp_path, name) -> None:
    make(tmp_path, 1)
    with pytest.raises(ValueError, match="a whole checkpoint-N"):
        named_checkpoint(tmp_path / "checkpoint-1", name)


def test_pruning_leaves_what_it_is_told_to(tmp_path) -> None:
    make(tmp_path, 1, 2, 3)
    prune(tmp_path / "checkpoint-3", 1, protect=["checkpoint-2"])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x"}', '{"step": 1}'])
def test_a_broken_pointer_is_none(tmp_path, text) -> None:
    (tmp_path / "best.json").write_text(text)
    assert read_best(tmp_path) is None


@pytest.mark.parametrize(("mode", "better"), [("min", 0.2), ("max", 0.4)])
def test_better_by_mode(mode, better) -> None:
    best = Best(1, "m", mode, 0.3)
    assert best.beaten_by(better)
    assert not best.beaten_by(0.3)
    assert not best.beaten_by(0.6 - better)


@pytest.fixture
def run(tmp_path, tmp_path_factory, monkeypatch):
    """Makes trainers whose validations find given values, by step."""
    values = {0: 0.1, 1: 5.0, 2: 3.0, 3: 4.0, 4: 2.0, 5: 6.0}

    def scripted(self, student, spec, step):
        return Validation(Image.new("RGB", (4, 4)), {"teacher_rmse": values[step]})

    monkeypatch.setattr(Validator, "run", scripted)

    def build(**options):
        return build_trainer(
            "dmd2", teacher_dir("sd_v", tmp_path_factory), "lora", tmp_path,
            **{
                "max_train_steps": 5, "checkpointing_steps": 0, "validation_steps": 1,
                "validation_prompts": ["a"], "num_validation_images": 1,
                "best_metric": "teacher_rmse", **options,
            },
        )  # fmt: skip

    return build


def test_the_best_is_saved_between_checkpoints_and_the_one_before_goes(run, tmp_path) -> None:
    """The untrained student, at 0.1, is no candidate."""
    run().train()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]
    assert fault_of(tmp_path / "checkpoint-4") is None
    told = json.loads((tmp_path / "best.json").read_text())
    assert told == {
        "checkpoint": "checkpoint-4", "step": 4, "metric": "teacher_rmse", "mode": "min",
        "value": 2.0, "extra": True,
    }  # fmt: skip


def test_a_limit_of_one_keeps_the_newest_and_the_best(run, tmp_path) -> None:
    run(
        best_mode="max", checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=4
    ).train()
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-4"]


def test_a_kill_before_the_pointer_is_mended_on_resuming(run, tmp_path) -> None:
    run(max_train_steps=4).train()
    (tmp_path / "best.json").unlink()
    again = run(resume_from_checkpoint="latest")
    again.train()
    best = read_best(tmp_path)
    assert best is not None
    assert (best.step, best.value) == (4, 2.0)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]
