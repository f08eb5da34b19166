"""Teachers as people keep them: on the Hub, at a revision, as fp16 files, with parts left out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from support.loras import style_lora
from support.runs import fingerprint, teacher_dir

from stepdistill import TrainConfig, Tuning
from stepdistill.data.stream import PromptDataset
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.loading.teacher_lora import LORA_WEIGHT_NAME_SAFE
from stepdistill.testing.tiny import tiny_sd3, tiny_sdxl
from stepdistill.trainers import VariationalScoreTrainer, trainer_of_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_on_hub(cache: Path, repo: str, folder: Path, revision: str = "main") -> None:
    """A snapshot of `folder` in a Hub cache, as a download leaves it."""
    home = cache / f"models--{repo.replace('/', '--')}"
    (home / "refs").mkdir(parents=True, exist_ok=True)
    commit = COMMIT if revision == "main" else COMMIT[::-1]
    (home / "refs" / revision).write_text(commit)
    shutil.copytree(folder, home / "snapshots" / commit)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hub cache, offline."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.full
def test_a_hub_id_serves_as_a_folder_does(cache, tmp_path, tmp_path_factory) -> None:
    folder = teacher_dir("sd_v", tmp_path_factory)
    put_on_hub(cache, "me/teacher", folder)
    assert ModelSource.of("me/teacher").pipeline_class == "StableDiffusionPipeline"
    assert teacher_facts("me/teacher").setting.kind == "v"
    args = TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_train_steps=1,
        tuning=Tuning(rank=2),
        disable_progress_bar=True,
    )
    VariationalScoreTrainer("me/teacher", args, PromptDataset(["a"])).train()
    out = trainer_of_run(tmp_path / "run").export(tmp_path / "out")
    assert "base_model: me/teacher" in (out / "README.md").read_text()


def test_a_revision_is_the_one_that_is_read(cache, tmp_path_factory) -> None:
    put_on_hub(cache, "me/teacher", teacher_dir("sd", tmp_path_factory))
    put_on_hub(cache, "me/teacher", teacher_dir("sd_v", tmp_path_factory), "v2")
    assert teacher_facts("me/teacher").setting.kind == "eps"
    assert teacher_facts(ModelSource("me/teacher", revision="v2")).setting.kind == "v"
    assert load_family(ModelSource.of("me/teacher", revision="v2")).kind == "v"


@pytest.mark.full
def test_a_lora_on_the_hub(cache, tmp_path, tmp_path_factory) -> None:
    folder = teacher_dir("sd_v", tmp_path_factory)
    delta = style_lora(folder, tmp_path / "style", 0)
    put_on_hub(cache, "me/style", tmp_path / "style")
    name = next(iter(delta))
    for text in ("me/style:2", f"me/style/{LORA_WEIGHT_NAME_SAFE}:2"):
        ours = (
            load_family(ModelSource.of(folder, teacher_lora=[text])).net.get_submodule(name).weight
        )
        base = load_family(folder).net.get_submodule(name).weight
        torch.testing.assert_close(ours, base + 2 * delta[name], rtol=0, atol=1e-5)


def test_a_variant_is_the_one_that_is_read(tmp_path, tmp_path_factory) -> None:
    pipe = load_family(teacher_dir("sd_v", tmp_path_factory)).pipeline
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    family = load_family(ModelSource.of(tmp_path, variant="fp16"), torch_dtype=torch.float16)
    assert family.net.dtype == torch.float16
    with pytest.raises(ValueError, match="no file named"):
        load_family(tmp_path)


def test_no_safety_checker_is_no_obstacle(tmp_path_factory) -> None:
    folder = teacher_dir("sd_v", tmp_path_factory)
    assert json.loads((folder / "model_index.json").read_text())["safety_checker"] == [None, None]
    assert load_family(folder).pipeline.safety_checker is None


@pytest.mark.full
def test_sd3_trains_without_t5_and_says_so(tmp_path) -> None:
    """The export is without T5 too, and its card tells from_pretrained."""
    tiny_sd3().save_pretrained(tmp_path / "teacher")
    args = TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_train_steps=1,
        tuning=Tuning(rank=2),
        disable_progress_bar=True,
    )
    trainer = VariationalScoreTrainer(str(tmp_path / "teacher"), args, PromptDataset(["a"]))
    trainer.train()
    for form in ("pipeline", "lora"):
        out = trainer_of_run(tmp_path / "run").export(tmp_path / form, format=form)
        assert "text_encoder_3=None, tokenizer_3=None" in (out / "README.md").read_text()


@pytest.mark.full
def test_sd3_leaves_a_present_t5_out_when_told(tmp_path) -> None:
    tiny_sd3(with_t5=True).save_pretrained(tmp_path)
    whole = load_family(tmp_path)
    without = load_family(tmp_path, text_encoder_3=None, tokenizer_3=None)
    assert whole.pipeline.text_encoder_3 is not None
    assert without.pipeline.text_encoder_3 is None
    assert fingerprint(whole.net.state_dict()) == fingerprint(without.net.state_dict())


def test_no_text_encoder_at_all_is_told(tmp_path) -> None:
    tiny_sdxl().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="to encode prompts, got a pipeline without any"):
        load_family(tmp_path, text_encoder=None, text_encoder_2=None)
