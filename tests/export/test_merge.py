"""Merging two exported students: endpoints bit for bit, the mean between, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import build_trainer, teacher_dir
from torch import Tensor

from stepdistill.core.solvers import SamplerSpec
from stepdistill.export.merge_pipelines import merge_pipelines
from stepdistill.export.pipeline import RECORD, export_pipeline
from stepdistill.families.registry import load_family


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> tuple[Path, Path]:
    """Exports of a full and of a LoRA student, both moved off the teacher."""
    teacher, root = teacher_dir("sd_v", tmp_path_factory), tmp_path_factory.mktemp("students")
    for seed, layout in enumerate(("full", "lora")):
        trainer = build_trainer("vsd", teacher, layout, root / f"run-{layout}")
        generator = torch.Generator().manual_seed(seed)
        for param in trainer.bank.members("student").values():
            param.data += 0.05 * torch.randn(param.shape, generator=generator)
        facts = {"model": "teacher", "method": "vsd", "step": seed}
        spec = SamplerSpec((1.0,), trained_times=(1.0,))
        export_pipeline(trainer.family, trainer.bank, spec, root / layout, facts)
    return root / "full", root / "lora"


def weights(folder: Path, part: str = "unet") -> dict[str, Tensor]:
    files = sorted((folder / part).glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.full
@pytest.mark.parametrize(("weight", "which"), [(1.0, 0), (0.0, 1)])
def test_the_ends_are_the_students_themselves(weight, which, students, tmp_path) -> None:
    out = merge_pipelines(*students, tmp_path / "out", weight)
    assert_equal(weights(out), weights(students[which]))


@pytest.mark.full
def test_between_the_ends_every_weight_is_the_mean(students, tmp_path) -> None:
    a, b = (weights(folder) for folder in students)
    assert any(not torch.equal(a[name], b[name]) for name in a)
    out = weights(merge_pipelines(*students, tmp_path / "out", 0.25))
    for name in a:
        torch.testing.assert_close(out[name], 0.25 * a[name] + 0.75 * b[name], rtol=0, atol=1e-7)


@pytest.mark.full
def test_frozen_parts_stay_as_they_are_and_the_folder_loads(students, tmp_path) -> None:
    out = merge_pipelines(*students, tmp_path / "out")
    assert_equal(weights(out, "vae"), weights(students[0], "vae"))
    family = load_family(out)
    assert_equal(dict(family.net.state_dict()), weights(out))
    record = json.loads((out / RECORD).read_text())
    assert record["merged"]["weight"] == 0.5
    assert record["merged"]["run_b"]["step"] == 1
    assert record["run"]["step"] == 0
    assert not list(tmp_path.glob(".*"))


@pytest.mark.full
def test_shards_of_another_layout_are_found_by_name(students, tmp_path) -> None:
    split = tmp_path / "split"
    shutil.copytree(students[1], split)
    state = weights(split)
    (file,) = (split / "unet").glob("*.safetensors")
    file.unlink()
    names = sorted(state)
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, split / "unet" / f"part-{i}.safetensors")
    out = merge_pipelines(students[0], split, tmp_path / "out")
    assert_equal(weights(out), weights(merge_pipelines(*students, tmp_path / "whole")))


def altered(folder: Path, tmp_path: Path, how: str) -> Path:
    copy = tmp_path / "altered"
    shutil.copytree(folder, copy)
    record = json.loads((copy / RECORD).read_text())
    (file,) = (copy / "unet").glob("*.safetensors")
    state = load_file(file)
    if how == "times":
        record["times"] = [0.5]
    elif how == "name":
        state["another"] = state.pop(next(iter(state)))
    elif how == "shape":
        first = next(iter(state))
        state[first] = torch.zeros(1, 2, 3)
    elif how == "lora":
        save_file({"x": torch.zeros(1)}, copy / "pytorch_lora_weights.safetensors")
    elif how == "peft":
        save_file({"x": torch.zeros(1)}, copy / "adapter_model.safetensors")
    (copy / RECORD).write_text(json.dumps(record))
    save_file(state, file)
    if how == "record":
        (copy / RECORD).unlink()
    return copy


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("times", "sampled alike"),
        ("name", "another"),
        ("shape", r"\(1, 2, 3\)"),
        ("lora", "a LoRA file"),
        ("peft", "a LoRA file"),
        ("record", "expected a pipeline export"),
    ],
)
def test_students_that_do_not_fit_are_refused(how, said, students, tmp_path) -> None:
    with pytest.raises(ValueError, match=said):
        merge_pipelines(students[0], altered(students[1], tmp_path, how), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_weight_outside_zero_to_one_is_refused(students, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\], got 1.5"):
        merge_pipelines(*students, tmp_path / "out", 1.5)


def test_a_folder_with_other_files_is_left_alone(students, tmp_path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"merge: expected a new folder.*note\.txt"):
        merge_pipelines(*students, tmp_path)
