"""The best checkpoint is kept by a named metric: pruning leaves it, and no kill loses it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from PIL import Image
from support.runs import build_trainer, teacher_dir

from stepdistill import TrainConfig
from stepdistill.config.files import parse_run_config
from stepdistill.config.metrics import BEST_METRICS
from stepdistill.monitoring.best import Best, read_best, write_best
from stepdistill.monitoring.validation import Validation, Validator
from stepdistill.storage.checkpoints import list_checkpoints
from stepdistill.storage.folders import fault_of, write_folder
from stepdistill.trainers import trainer_of_run
from stepdistill.training.checkpoint import named_checkpoint, prune


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
        found = dict.fromkeys(("teacher_rmse", "diversity_ratio"), values[step])
        return Validation(Image.new("RGB", (4, 4)), found)

    monkeypatch.setattr(Validator, "run", scripted)

    def build(**options):
        return build_trainer(
            "dmd2", teacher_dir("sd3", tmp_path_factory), "lora", tmp_path,
            **{
                "max_train_steps": 5, "checkpointing_steps": 0, "validation_steps": 1,
                "validation_prompts": ["a"], "num_validation_images": 2,
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


@pytest.mark.full
def test_a_limit_of_one_keeps_the_newest_and_the_best(run, tmp_path) -> None:
    run(checkpointing_steps=1, checkpoints_total_limit=1, max_train_steps=3).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


@pytest.mark.full
def test_the_most_diverse_is_the_best_by_diversity(run, tmp_path) -> None:
    """Of 5, 3, 4 and 2."""
    run(best_metric="diversity_ratio", checkpointing_steps=1, max_train_steps=4).train()
    best = read_best(tmp_path)
    assert best is not None
    assert (best.step, best.mode, best.value) == (1, "max", 5.0)


@pytest.mark.full
def test_a_best_of_the_wrong_direction_is_not_gone_by_on_resuming(run, tmp_path) -> None:
    """An earlier version kept the lowest diversity of updates 1 to 3, and called it the best."""
    run(best_metric="diversity_ratio", checkpointing_steps=1, max_train_steps=3).train()
    wrong = Best(2, "diversity_ratio", "min", 3.0)
    write_best(tmp_path, wrong)
    again = run(best_metric="diversity_ratio", resume_from_checkpoint="latest")
    load = again.log.load_state_dict
    again.log.load_state_dict = lambda state: load({**state, "best": asdict(wrong)})
    again.train()
    best = read_best(tmp_path)
    assert best is not None
    assert (best.step, best.mode, best.value) == (5, "max", 6.0)


@pytest.mark.full
def test_a_kill_before_the_pointer_is_mended_on_resuming(run, tmp_path) -> None:
    run(max_train_steps=4).train()
    (tmp_path / "best.json").unlink()
    again = run(resume_from_checkpoint="latest")
    again.train()
    best = read_best(tmp_path)
    assert best is not None
    assert (best.step, best.value) == (4, 2.0)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-5"]


# ------------------------------------------------------------- what is refused
OPTIONS = {
    "validation_prompts": ["a"], "validation_steps": 2, "num_validation_images": 2,
    "validation_teacher_steps": 3,
}  # fmt: skip
REFUSED = [
    ({"best_metric": "fid"}, r"expected one of frechet_diagonal, .*got 'fid'"),
    ({"best_metric": "diversity", "validation_steps": 0}, "expected validation_steps"),
    ({"best_metric": "x0_std_ratio"}, r".*got 'x0_std_ratio', which has no best value: 1 is"),
    ({"best_metric": "saturation_excess"}, r".*no best value: a student of grey images"),
    ({"best_metric": "guided_mean_drift"}, r".*no best value: .* the same at every validation"),
    ({"best_metric": "fake_lag"}, r".*no best value: it judges the fake"),
    ({"best_metric": "fake_lag_error"}, r".*no best value: it says how sure"),
    (
        {"best_metric": "diversity", "num_validation_images": 1},
        r"expected num_validation_images 2 or more beside diversity, .* got 1\. Raise",
    ),
    (
        {"best_metric": "diversity_ratio", "num_validation_images": 1},
        r"expected num_validation_images 2 or more beside diversity_ratio",
    ),
    (
        {"best_metric": "teacher_rmse", "validation_teacher_steps": 0},
        r"expected validation_teacher_steps beside teacher_rmse, .* got 0\. Set",
    ),
]


@pytest.mark.parametrize(("options", "told"), REFUSED)
def test_a_best_metric_to_go_by_none_is_refused(options, told) -> None:
    with pytest.raises(ValueError, match=f"best_metric: {told}"):
        TrainConfig(**{**OPTIONS, **options})


@pytest.mark.parametrize("name", BEST_METRICS)
def test_every_metric_with_a_direction_may_be_named(name) -> None:
    assert TrainConfig(**OPTIONS, best_metric=name).best_metric == name


def test_the_direction_is_no_option() -> None:
    argv = ["--method", "dmd2", "--pretrained_model_name_or_path", "x"]
    with pytest.raises(ValueError, match=r"expected known options, got \['best_mode'\]"):
        parse_run_config([*argv, "--best_mode", "max"])


@pytest.mark.usefixtures("no_loading")
def test_a_metric_that_the_method_never_measures_is_refused_before_loading(
    tmp_path, tmp_path_factory
) -> None:
    with pytest.raises(ValueError, match=r"reflow measures .*, got trajectory_rmse.*teacher_rmse"):
        build_trainer(
            "reflow_raw", teacher_dir("sd3", tmp_path_factory), "full", tmp_path,
            **OPTIONS, best_metric="trajectory_rmse",
        )  # fmt: skip


@pytest.mark.usefixtures("no_loading")
@pytest.mark.filterwarnings("ignore:best_mode has no effect")
def test_nobody_trains_by_what_an_earlier_version_took(tmp_path, tmp_path_factory) -> None:
    with pytest.raises(ValueError, match="'fake_lag', which has no best value"):
        build_trainer(
            "dmd2", teacher_dir("sd3", tmp_path_factory), "lora", tmp_path,
            **OPTIONS, best_metric="fake_lag", best_mode="max",
        )  # fmt: skip


def test_an_option_without_effect_is_told() -> None:
    with pytest.warns(UserWarning, match="best_mode has no effect"):
        TrainConfig(**OPTIONS, best_metric="teacher_rmse", best_mode="max")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:best_mode has no effect")
def test_a_run_of_an_earlier_version_is_exported(run, tmp_path) -> None:
    """Its record holds best_mode, and a best_metric that none may train by now."""
    run(max_train_steps=1).train()
    facts = json.loads((tmp_path / "run.json").read_text())
    assert "best_mode" not in facts["train_config"]
    facts["train_config"] |= {"best_mode": "min", "best_metric": "fake_lag"}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    assert trainer_of_run(tmp_path, "best").step == 1


def test_a_validation_without_the_metric_ends_the_run_at_its_start(run, tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"expected one of teacher_rmse, diversity_ratio, .*got x0_mean_drift\. "
    ):
        run(best_metric="x0_mean_drift").train()
    assert names(tmp_path) == []


@pytest.mark.full
def test_so_does_one_after_resuming(run, tmp_path) -> None:
    run(max_train_steps=1).train()
    again = run(resume_from_checkpoint="latest", best_metric="x0_mean_drift")
    with pytest.raises(ValueError, match="best_metric: expected one of teacher_rmse"):
        again.train()
    assert again.step == 2


def test_all_ranks_hear_of_it(run, monkeypatch) -> None:
    """The others make no samples: what they know of them is broadcast."""
    told = [{"saturation": 0.1}]
    monkeypatch.setattr("stepdistill.monitoring.logs.broadcast_object_list", lambda _: told)
    with pytest.raises(ValueError, match="best_metric: expected one of none, which"):
        run().log.validation(None, 0, 0.0)


def test_a_rule_across_options_is_one_plain_line(tmp_path) -> None:
    flags = ["--pretrained_model_name_or_path", "x", "--method", "dmd2"]
    flags += ["--output_dir", str(tmp_path), "--best_metric", "fake_lag"]
    with pytest.raises(ValueError, match="best_metric") as refused:
        parse_run_config(flags)
    assert str(refused.value).startswith("config: best_metric: expected one of frechet_diagonal")
    assert "validation error" not in str(refused.value)
    assert "pydantic" not in str(refused.value)
