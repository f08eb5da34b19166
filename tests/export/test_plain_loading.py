"""Exports of half-precision runs load in stock Diffusers with nothing said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from support.runs import build_trainer, teacher_dir

from stepdistill.export.load import load_pipeline
from stepdistill.export.pipeline import load_alike
from stepdistill.loading.source import ModelSource


@pytest.fixture(autouse=True)
def _own_precision() -> Iterator[None]:
    """Accelerate keeps the first precision of a process: forget it before and after."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux"])
def test_a_bf16_run_s_export_runs_as_its_card_says(family, tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer(
        "dmd2",
        teacher_dir(family, tmp_path_factory),
        "lora",
        tmp_path / "run",
        max_train_steps=1,
        mixed_precision="bf16",
    )
    trainer.train()
    folder = trainer.export(tmp_path / "pipeline")
    call = json.loads((folder / "distillation.json").read_text())["call"]
    plain = DiffusionPipeline.from_pretrained(folder)
    networks = [one for one in plain.components.values() if isinstance(one, torch.nn.Module)]
    assert {one.dtype for one in networks} == {torch.float32}
    for pipe in (plain, load_pipeline(folder)):
        pipe.set_progress_bar_config(disable=True)
        told: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1, **call}
        assert pipe("a red cube", **told).images[0].size[0] > 0
    half = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert {half.components[name].dtype for name in ("vae", "text_encoder")} == {torch.bfloat16}


def test_types_inside_a_config_are_named_too(tmp_path: Path) -> None:
    part = tmp_path / "text_encoder"
    part.mkdir()
    config = {"transformers_version": "5", "text_config": {"dtype": "bfloat16", "n": 1}, "n": None}
    (part / "config.json").write_text(json.dumps(config))
    load_alike(tmp_path)
    found = json.loads((part / "config.json").read_text())
    assert found == {**config, "text_config": {"dtype": "float32", "n": 1}}


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "../nowhere"])
def test_a_mistyped_folder_is_no_network_fault(path: str) -> None:
    expected = r"expected a pipeline folder or a Hub id \(user/name\), got .*not there"
    with pytest.raises(ValueError, match=expected):
        assert ModelSource.of(path).pipeline_class
