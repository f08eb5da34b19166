"""Finding and loading a family: every wrong model id is refused before a weight is read."""

from __future__ import annotations

import json

import pytest
import torch

from stepdistill.families.registry import family_for, load_family, teacher_facts
from stepdistill.loading.source import ModelSource
from stepdistill.testing.tiny import tiny_sd, tiny_sd3


def test_folder_without_an_index_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="expected a Diffusers pipeline folder"):
        load_family(tmp_path)


@pytest.mark.parametrize("text", ["{broken", ""])
def test_broken_index_is_refused(text, tmp_path) -> None:
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(ValueError, match="expected valid JSON"):
        load_family(tmp_path)


@pytest.mark.parametrize("content", [[], {}, {"_class_name": 3}, "text"])
def test_index_without_a_class_is_refused(content, tmp_path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="_class_name"):
        load_family(tmp_path)


def test_unserved_class_names_the_nearest(tmp_path) -> None:
    index = {"_class_name": "StableDiffusion3Pipline"}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"Nearest: \['StableDiffusion3Pipeline'"):
        load_family(tmp_path)


def test_a_class_like_nothing_served_lists_all() -> None:
    with pytest.raises(ValueError, match=r"DiTPipeline.*StableDiffusionPipeline"):
        family_for("Zzz")


def test_sd3_without_t5_loads_though_the_stock_call_does_not(tmp_path) -> None:
    from diffusers import DiffusionPipeline

    tiny_sd3().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="text_encoder_3"):
        DiffusionPipeline.from_pretrained(tmp_path)
    family = load_family(tmp_path)
    assert family.pipeline.text_encoder_3 is None
    assert family.encode(["a"])["prompt_embeds"].shape[0] == 1


def test_weights_load_in_the_dtype_asked_for(tmp_path) -> None:
    tiny_sd().save_pretrained(tmp_path)
    assert load_family(tmp_path, torch_dtype=torch.bfloat16).net.dtype == torch.bfloat16


def test_pickled_weights_are_refused(tmp_path) -> None:
    tiny_sd().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="expected safetensors, got the pickled"):
        load_family(tmp_path)


def test_setting_needs_no_weights(tmp_path) -> None:
    tiny_sd("v_prediction").save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    assert teacher_facts(tmp_path).setting.kind == "v"
    assert ModelSource.of(tmp_path).pipeline_class == "StableDiffusionPipeline"
