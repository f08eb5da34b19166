"""Merging LoRA files: sums of deltas, endpoints, refusals before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.runs import build_trainer, teacher_dir

from stepdistill.cli import main
from stepdistill.export.adapter_files import read_adapters
from stepdistill.export.lora import export_lora
from stepdistill.export.lora_formats import adapters_of, read_format, read_with_diffusers
from stepdistill.export.merge_adapters import merge_adapters
from stepdistill.export.pipeline import RECORD
from stepdistill.families.registry import load_family

FACTS = {"model": "base", "method": "dmd2", "step": 1, "seed": 0}
LORA_FILE = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """student(family, form, seed, alpha, **tuning), each of them exported once."""
    students = {}

    def make(family, form, seed, alpha, **tuning):
        key = (family, form, seed, alpha, *tuning.items())
        if key not in students:
            out = tmp_path_factory.mktemp("student")
            teacher = teacher_dir(family, tmp_path_factory)
            trainer = build_trainer("dmd2", teacher, "lora", out / "run", alpha=alpha, **tuning)
            generator = torch.Generator().manual_seed(seed)
            for param in trainer.bank.members("student").values():
                param.data = 0.15 * torch.randn(param.shape, generator=generator)
            spec, dtype = trainer.method.sampler(), "float32"
            folder = export_lora(
                trainer.family, trainer.bank, spec, out / "lora", FACTS, "student", form, dtype
            )
            adapters = adapters_of(trainer.family.net, "student")
            students[key] = folder, {n: x.delta() for n, x in adapters.items()}, trainer
        return students[key]

    return make


@pytest.fixture
def student(made, tmp_path):
    """(its folder, to write in; deltas; trainer) of an exported student with random factors."""

    def copied(family, form, seed, alpha=7.0, **tuning):
        folder, deltas, trainer = made(family, form, seed, alpha, **tuning)
        copy = tmp_path / f"{family}-{form}-{seed}" / folder.name
        shutil.copytree(folder, copy)
        return copy, deltas, trainer

    return copied


@pytest.fixture
def pair(student):
    """Two LoRA students of one teacher with different alphas."""
    return [student("sd_v", "lora", i, alpha) for i, alpha in enumerate((7.0, 1.0))]


def assert_sum(read, first, second, weights) -> None:
    assert read.keys() == first.keys()
    for name in first:
        wanted = weights[0] * first[name] + weights[1] * second[name]
        torch.testing.assert_close(read[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, -2.0), (1.0, 0.0), (0.0, 1.0)])
def test_cat_is_the_weighted_sum_of_deltas(weights, pair, tmp_path) -> None:
    (a, first, trainer), (b, second, _) = pair
    out = merge_adapters([f"{a}:{weights[0]}", f"{b}:{weights[1]}"], tmp_path / "out")
    assert_sum(read_with_diffusers(trainer.family, out / LORA_FILE), first, second, weights)
    ranks = {x.down.shape[0] for x in read_adapters(out).adapters.values()}
    assert ranks == {2 * sum(w != 0 for w in weights)}


@pytest.mark.parametrize("form", ["kohya", "comfyui"])
def test_cat_of_other_tools_files(form, student, tmp_path) -> None:
    (a, first, trainer), (b, second, _) = (
        student("sd3", form, i, alpha) for i, alpha in enumerate((7.0, 1.0))
    )
    out = merge_adapters([str(a), f"{b}:0.5"], tmp_path / "both")
    read = read_format(out / "both.safetensors", trainer.family.net, form)
    read = {name: value for name, value in read.items() if name in first}
    assert_sum(read, first, second, (1.0, 0.5))


@pytest.mark.full
def test_cat_of_peft_folders(student, tmp_path) -> None:
    (a, first, trainer), (b, second, _) = (student("pixart", "lora", i) for i in range(2))
    out = merge_adapters([str(a), f"{b}:0.5"], tmp_path / "both")
    plain = load_family(trainer.teacher).net
    base = {name: value.clone() for name, value in plain.state_dict().items()}
    merged = PeftModel.from_pretrained(plain, str(out)).merge_and_unload().state_dict()
    read = {name: merged[f"{name}.weight"] - base[f"{name}.weight"] for name in first}
    assert_sum(read, first, second, (1.0, 0.5))


@pytest.mark.full
def test_adapters_of_different_modules_and_ranks_add_up(student, tmp_path) -> None:
    from stepdistill import Tuning

    (a, first, trainer), (b, second, _) = (
        student(
            "sd_v",
            "lora",
            i,
            tuning=Tuning(rank=rank, alpha=3.0, target_modules=targets),
        )
        for i, (rank, targets) in enumerate(((2, ("to_q", "to_k")), (3, ("to_k", "conv1"))))
    )
    out = merge_adapters([str(a), str(b)], tmp_path / "out")
    read = read_with_diffusers(trainer.family, out / LORA_FILE)
    assert read.keys() == first.keys() | second.keys()
    for name, delta in read.items():
        wanted = first.get(name, torch.zeros(())) + second.get(name, torch.zeros(()))
        torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(("weights", "which"), [((1, 0), 0), ((0, 1), 1)])
def test_linear_has_the_files_as_ends(weights, which, student, tmp_path) -> None:
    folders = [student("sd_v", "lora", i)[0] for i in range(2)]
    sources = [f"{f}:{w}" for f, w in zip(folders, weights, strict=True)]
    out = merge_adapters(sources, tmp_path / "out", "linear")
    ours, theirs = load_file(out / LORA_FILE), load_file(folders[which] / LORA_FILE)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.full
def test_linear_averages_the_factors(student, tmp_path) -> None:
    folders = [student("sd_v", "lora", i)[0] for i in range(2)]
    out = merge_adapters([f"{folders[0]}:0.25", f"{folders[1]}:0.75"], tmp_path / "out", "linear")
    ours, a, b = (load_file(folder / LORA_FILE) for folder in (out, *folders))
    for name in ours:
        torch.testing.assert_close(ours[name], 0.25 * a[name] + 0.75 * b[name])


@pytest.mark.full
def test_the_student_s_record_and_scheduler_stay(pair, tmp_path) -> None:
    (a, _, _), (b, _, _) = pair
    out = merge_adapters([str(a), f"{b}:0.5"], tmp_path / "out")
    record = json.loads((out / RECORD).read_text())
    assert (
        record["num_inference_steps"] == json.loads((a / RECORD).read_text())["num_inference_steps"]
    )
    assert [entry["weight"] for entry in record["merged"]["of"]] == [1.0, 0.5]
    assert (out / "scheduler" / "scheduler_config.json").is_file()
    assert "at weight 0.5" in (out / "README.md").read_text()


@pytest.mark.full
def test_a_style_without_a_record_merges_too(pair, tmp_path) -> None:
    (a, first, trainer), (b, second, _) = pair
    (b / RECORD).unlink()
    out = merge_adapters([str(b), str(a)], tmp_path / "out")
    assert_sum(read_with_diffusers(trainer.family, out / LORA_FILE), second, first, (1, 1))
    assert json.loads((out / RECORD).read_text())["num_inference_steps"]


@pytest.mark.full
def test_the_command(pair, tmp_path, capsys) -> None:
    (a, first, trainer), (b, second, _) = pair
    main(["merge", f"{a}:0.5", f"{b}:0.5", "--output", str(tmp_path / "out")])
    assert str(tmp_path / "out") in capsys.readouterr().out
    read = read_with_diffusers(trainer.family, tmp_path / "out" / LORA_FILE)
    assert_sum(read, first, second, (0.5, 0.5))


def at_alpha(folder: Path, alpha: float) -> None:
    """As a file says whose scale is not in its weights."""
    path, told = folder / LORA_FILE, {}
    with safe_open(path, "pt") as file:
        told = dict(file.metadata())
    config = json.loads(told["lora_adapter_metadata"])
    told["lora_adapter_metadata"] = json.dumps({**config, "unet.lora_alpha": alpha})
    save_file(load_file(path), path, metadata=told)


def refused(sources, out: Path, match: str, method: str = "cat") -> None:
    with pytest.raises(ValueError, match=match):
        merge_adapters([str(s) for s in sources], out, method)
    assert not out.exists()


@pytest.mark.full
def test_what_does_not_fit_is_refused(pair, student, tmp_path) -> None:
    (a, _, _), (b, _, _) = pair
    out = tmp_path / "out"
    refused([a], out, "two LoRA files or more")
    refused([a, f"{b}:much"], out, "with a finite weight")
    refused([f"{a}:0", f"{b}:0"], out, "weight other than 0")
    refused([a, b], out, "sum to 1", "linear")
    at_alpha(b, 1.0)
    refused([f"{a}:0.5", f"{b}:0.5"], out, "same modules, rank and alpha", "linear")
    refused([a, tmp_path / "nowhere"], out, "file or its folder")
    refused([a, b], out, "a method of", "svd")
    other, _, _ = student("sd3", "lora", 0)
    refused([a, other], out, "one format and model")
    kohya, _, _ = student("sd_v", "kohya", 0)
    refused([a, kohya], out, "one format and model")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\xff" * 64)
    refused([a, broken], out, "whole safetensors file")
    dora = {**load_file(a / LORA_FILE), "unet.x.lora_magnitude_vector": torch.zeros(1)}
    save_file(dora, tmp_path / "dora.safetensors")
    refused([a, tmp_path / "dora.safetensors"], out, "a plain LoRA")


def test_students_of_other_steps_are_refused(pair, tmp_path) -> None:
    (a, _, _), (b, _, _) = pair
    record = json.loads((b / RECORD).read_text())
    (b / RECORD).write_text(json.dumps({**record, "times": [0.5]}))
    refused([a, b], tmp_path / "out", "sampled alike")
