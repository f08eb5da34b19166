"""Nothing changes under a run unnoticed: its models and data are known by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.runs import build_trainer, teacher_dir

from stepdistill import TrainConfig
from stepdistill.loading.source import ModelSource
from stepdistill.trainers import trainer_of_run
from stepdistill.training.run_identity import same_data, same_run, teacher_is_here

NET = "transformer/diffusion_pytorch_model.safetensors"


def write_other_weights(folder: Path) -> None:
    state = load_file(folder / NET)
    save_file({name: value + 0.01 for name, value in state.items()}, folder / NET)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a teacher and a run of one step on it."""
    root = tmp_path_factory.mktemp("same_run")
    shutil.copytree(teacher_dir("sd3", tmp_path_factory), root / "teacher")
    build_trainer("vsd", root / "teacher", "lora", root / "run", max_train_steps=1).train()
    return root


@pytest.fixture
def root(trained, tmp_path) -> Path:
    """A copy of it whose record names the copy."""
    copied = Path(shutil.copytree(trained, tmp_path / "root"))
    for file in (copied / "run" / "run.json",):
        file.write_text(file.read_text().replace(str(trained), str(copied)))
    return copied


@pytest.fixture
def no_weights(monkeypatch) -> None:
    def read(*args: Any, **options: Any) -> None:
        pytest.fail("a weight was read")

    monkeypatch.setattr("stepdistill.training.trainer.load_family", read)


def resume(root: Path, teacher: str = "teacher", **options: Any) -> Any:
    options = {"max_train_steps": 2, "resume_from_checkpoint": "latest", **options}
    return build_trainer("vsd", root / teacher, "lora", root / "run", **options)


@pytest.mark.full
def test_weights_replaced_in_place_are_another_teacher(root, no_weights) -> None:
    write_other_weights(root / "teacher")
    line = rf"the teacher that the run was trained with, got another content of {NET} in {root}"
    with pytest.raises(ValueError, match=line):
        resume(root)
    with pytest.raises(ValueError, match=line):  # what export begins with
        trainer_of_run(root / "run")


@pytest.mark.full
def test_a_moved_teacher_is_the_same(root) -> None:
    (root / "teacher").rename(root / "moved")
    trainer = resume(root, "moved")
    trainer.train()
    assert trainer.step == 2
    assert json.loads((root / "run" / "run.json").read_text())["model"] == str(root / "moved")


@pytest.mark.full
def test_a_relative_teacher_serves_from_every_working_directory(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    shutil.copytree(teacher_dir("sd3", tmp_path_factory), tmp_path / "here" / "t")
    monkeypatch.chdir(tmp_path / "here")
    build_trainer("vsd", Path("t"), "lora", tmp_path / "run", max_train_steps=1).train()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert trainer_of_run(tmp_path / "run").teacher.model == str(tmp_path / "here" / "t")


@pytest.mark.parametrize("name", ["teacher", "./teacher", "me/teacher"])
def test_a_local_run_s_teacher_is_not_looked_for_on_the_hub(name, root, monkeypatch) -> None:
    monkeypatch.chdir("/")
    args = TrainConfig(output_dir=str(root / "run"), resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"expected the local files .*which is not there\. Name"):
        teacher_is_here(args, ModelSource(name))


FACTS: dict[str, Any] = {
    "model": "/a",
    "revision": None,
    "teacher_lora": [],
    "student_base": None,
    "method": "dmd2",
    "method_config": {},
    "tuning": {},
    "rewards": [],
    "seed": 0,
    "train_config": {"decoder": "/d"},
}
ONE, TWO = {"unet/x.safetensors": "1"}, {"unet/x.safetensors": "2"}


def facts(**values: Any) -> dict[str, Any]:
    from stepdistill.config.tuning import Tuning

    return {**FACTS, "tuning": Tuning().model_dump(mode="json"), **values}


# saved, now, what the line says (None: the same run)
RUNS: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({"identity": {"teacher": ONE}}, {"identity": {"teacher": ONE}, "model": "/b"}, None),
    ({"identity": {"teacher": ONE}}, {"identity": {"teacher": TWO}}, "content of unet/x.safet"),
    ({}, {"identity": {"teacher": ONE}}, None),  # an earlier run
    ({}, {"rewards": [{"kind": "clip"}]}, "rewards [] (saved) against [{'kind': 'clip'}]"),
    ({}, {"identity": {"teacher": ONE}, "model": "/b"}, "model '/a' (saved) against '/b'"),
    ({"identity": {"teacher": {"commit": "1"}}}, {"identity": {"teacher": ONE}}, None),
    (
        {"identity": {"teacher": {"commit": "1"}}, "revision": "main"},
        {"identity": {"teacher": {"commit": "1"}}},
        None,
    ),
    (
        {"identity": {"teacher": {"commit": "1"}}},
        {"identity": {"teacher": {"commit": "2"}}},
        "another content of commit",
    ),
    (
        {"identity": {"student_base": ONE}, "student_base": "/s"},
        {"identity": {"student_base": TWO}, "student_base": "/s"},
        "expected the student_base that the run was trained with",
    ),
    (
        {"identity": {"student_base": ONE}, "student_base": "/s"},
        {"identity": {"student_base": ONE}, "student_base": "/moved"},
        None,
    ),
    (
        {"identity": {"decoder": ONE}},
        {"identity": {"decoder": TWO}},
        "expected the decoder that the run was trained with, got another content of unet/x.safet",
    ),
    ({"identity": {"decoder": ONE}}, {"identity": {}}, None),  # to export
    (
        {"teacher_lora": [{"source": "/l", "scale": 1.0, "sha256": "1"}]},
        {"teacher_lora": [{"source": "/moved", "scale": 1.0, "sha256": "1"}]},
        None,
    ),
    (
        {"teacher_lora": [{"source": "/l", "scale": 1.0, "sha256": "1"}]},
        {"teacher_lora": [{"source": "/l", "scale": 1.0, "sha256": "2"}]},
        "got teacher_lora",
    ),
    ({"teacher_lora": [{"source": "/l", "scale": 1.0}]}, {}, "got teacher_lora"),
    ({"seed": 1}, {}, "seed 1 (saved) against 0"),
]


@pytest.mark.parametrize(("saved", "now", "line"), RUNS)
def test_what_is_another_run(saved, now, line) -> None:
    if line is None:
        same_run(facts(**saved), facts(**now))
        return
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the line is data)
        same_run(facts(**saved), facts(**now))
    assert line in str(refused.value)


A = {"source": "PromptDataset", "items": 2, "sha256": "a"}
B, STREAM = {**A, "sha256": "b"}, {"source": "Stream", "items": 9, "sha256": None}
DATA: list[tuple[Any, Any, str | None]] = [
    (A, A, None),
    (A, {**A, "source": "LineFile"}, None),
    (A, B, "data: expected the data that the run was begun with (PromptDataset of 2 items, sha25"),
    (STREAM, STREAM, None),
    (STREAM, {**STREAM, "items": 8}, "got Stream of 8 items"),
    (STREAM, A, "got PromptDataset of 2 items, sha256 a"),
    (None, A, None),
    (A, None, None),
    ({**A, "gan": A}, {**A, "gan": B}, "data.gan: expected"),
    ({**A, "gan": A}, A, None),  # said by other settings
]


@pytest.mark.parametrize(("was", "now", "line"), DATA)
def test_what_are_other_data(was, now, line) -> None:
    assert same_data(was, now, allowed=True) == (line is None)
    if line is not None:
        with pytest.raises(ValueError) as refused:  # noqa: PT011 (the line is data)
            same_data(was, now, allowed=False)
        assert line in str(refused.value)
        assert "--data_changed ok" in str(refused.value)


@pytest.mark.full
def test_other_data_are_refused_or_told(root, no_weights, monkeypatch) -> None:
    with pytest.raises(ValueError, match="data: expected the data that the run was begun with"):
        resume(root, dataset=["another prompt", "and one more"])
    monkeypatch.undo()
    trainer = resume(root, dataset=["another prompt", "and one more"], data_changed="ok")
    trainer.train()
    (change,) = json.loads((root / "run" / "run.json").read_text())["data_changed"]
    assert change["step"] == 1
    assert change["before"]["items"] != 2
    found = trainer_of_run(root / "run")
    for form in ("pipeline", "lora"):
        card = (found.export(root / form, format=form) / "README.md").read_text()
        assert "update 1, before: " in card
