"""Files merge left to right, flags come last, and every mistake names its neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stepdistill.config.files import method_config, parse_run_config
from stepdistill.config.layers import merge
from stepdistill.config.yaml_files import read_yaml
from stepdistill.methods import METHODS
from stepdistill.storage.bundled import bundled_names

ROOT = Path(__file__).parents[2]


X = ["--pretrained_model_name_or_path", "x", "--method", "dmd2"]


def write(path: Path, **values) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_resolved_config_is_read_without_a_warning(name, recwarn) -> None:
    """As runs save it: it gives every option, so none is an idle one of the user's."""
    config = METHODS[name].Config
    assert config(**config().model_dump()) == config()
    assert not [one for one in recwarn if "has no effect" in str(one.message)]


def test_merge_is_deep() -> None:
    assert merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}) == {"a": {"x": 1, "y": 3}}


def test_files_left_to_right_then_flags(tmp_path) -> None:
    first = write(tmp_path / "a.yaml", method="dmd2", tuning={"rank": 8, "student": "full"})
    second = write(tmp_path / "b.yaml", tuning={"rank": 16}, method_config={"critic_steps": 3})
    flags = (
        "--pretrained_model_name_or_path x --tuning.alpha 4 --method_config.guidance 2.5 --seed 7"
    )
    run = parse_run_config(
        ["--config", first, second, *flags.split(), "--validation_prompts", "a cat"]
    )
    assert (run.tuning.student, run.tuning.rank, run.tuning.alpha) == ("full", 16, 4.0)
    assert run.method_config["critic_steps"] == 3
    assert run.method_config["guidance"] == 2.5
    assert run.validation_prompts == ["a cat"]
    assert run.seed == 7


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "methods").glob("*.yaml")), ids=str)
def test_every_method_config_file_is_valid(path) -> None:
    values = read_yaml(path)
    run = parse_run_config(["--config", str(path), "--pretrained_model_name_or_path", "x"])
    assert run.method == values["method"]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "models").glob("*.yaml")), ids=str)
def test_every_model_config_file_is_valid(path) -> None:
    parse_run_config(
        ["--config", str(path), "--method", "dmd2", "--pretrained_model_name_or_path", "x"]
    )


def test_files_are_named_by_what_they_are(tmp_path, monkeypatch) -> None:
    """Wherever one stands; a file of one's own at that path wins."""
    monkeypatch.chdir(tmp_path)
    flags = ["--pretrained_model_name_or_path", "x"]
    named = parse_run_config(["--config", "dmd2", "sdxl", *flags])
    files = [str(ROOT / "configs" / f"{name}.yaml") for name in ("methods/dmd2", "models/sdxl")]
    assert named == parse_run_config(["--config", *files, *flags])
    assert (named.method, named.mixed_precision) == ("dmd2", "bf16")
    write(tmp_path / "sdxl", resolution=64)
    assert parse_run_config(["--config", "dmd2", "sdxl", *flags]).resolution == 64
    with pytest.raises(ValueError, match=r"got 'dmd3'.*Nearest: \['dmd', 'dmd2'"):
        parse_run_config(["--config", "dmd3", *flags])
    with pytest.raises(ValueError, match=r"got 'configs/dmd2.yaml'.*Nearest: \['dmd2'"):
        parse_run_config(["--config", "configs/dmd2.yaml", *flags])


def test_no_two_config_files_share_a_name() -> None:
    names = [name for folder in ("methods", "models", "recipes") for name in bundled_names(folder)]
    assert len(names) == len(set(names)) > 40


def test_every_method_has_a_config_file() -> None:
    files = (ROOT / "configs" / "methods").glob("*.yaml")
    assert {read_yaml(path)["method"] for path in files} == set(METHODS)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--method", "dmd3"], "dmd2"),
        (["--method", "dmd2", "--max_train_step", "3"], "max_train_steps"),
        (["--method", "dmd2", "--method_config.critic_step", "3"], "method_config.critic_steps"),
        (["--method", "dmd2", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--method", "dmd2", "--train_batch_size", "many"], "train_batch_size"),
        (["--method", "dmd2", "--validation_steps", "5"], "validation_prompts"),
    ],
)
def test_mistakes_are_named(argv, said) -> None:
    with pytest.raises(ValueError, match=said):
        parse_run_config([*argv, "--pretrained_model_name_or_path", "x"])


def test_unknown_file_key_names_the_nearest(tmp_path) -> None:
    path = write(tmp_path / "a.yaml", method="dmd2", learning_rat=1e-4)
    with pytest.raises(ValueError, match="learning_rate"):
        parse_run_config(["--config", path, "--pretrained_model_name_or_path", "x"])


def test_missing_model_is_said() -> None:
    with pytest.raises(ValueError, match="pretrained_model_name_or_path"):
        parse_run_config(["--method", "dmd2"])


def test_method_options_are_checked_too() -> None:
    with pytest.raises(ValueError, match="guidance"):
        method_config("dmd2", {"guidence": 3})


def test_a_list_of_groups_is_json_objects_one_by_one_or_together() -> None:
    one, two = '{"kind": "clip", "weight": 0.1}', '{"kind": "hps", "weight": 0, "every": 2}'
    for flags in ([one, two], [one, "--rewards", two], [f"[{one}, {two}]"]):
        run = parse_run_config([*X, "--rewards", *flags])
        assert [(r.kind, r.weight, r.every) for r in run.rewards] == [
            ("clip", 0.1, 1),
            ("hps", 0.0, 2),
        ]
    with pytest.raises((ValueError, TypeError), match="expected each key once"):
        parse_run_config([*X, "--rewards", '{"kind": "a", "kind": "b"}'])
    with pytest.raises(ValueError, match=r"expected rewards.0.weight, got .* a config file\.$"):
        parse_run_config([*X, "--rewards", '{"kind": "clip"}'])
    with pytest.raises(ValueError, match=r"rewards.0.*kind=clip"):
        parse_run_config([*X, "--rewards", "kind=clip"])


def test_environment_is_not_read(monkeypatch) -> None:
    monkeypatch.setenv("SEED", "99")
    assert parse_run_config(["--method", "dmd2", "--pretrained_model_name_or_path", "x"]).seed == 0
