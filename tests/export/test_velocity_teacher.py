"""The export of a velocity student is a teacher for the next run, whose student exports too."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import build_trainer, teacher_dir


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("sd_v", "FlowMatchEulerDiscreteScheduler"),
        ("sdxl", "FlowMapEulerDiscreteScheduler"),
        ("unet2d", "FlowMatchEulerDiscreteScheduler"),  # its call scales no input
    ],
)
def test_velocity_export_is_distilled_and_exported_again(
    family: str, scheduler: str, tmp_path: Path, tmp_path_factory: Any
) -> None:
    first = build_trainer(
        "reflow_raw", teacher_dir(family, tmp_path_factory), "full", tmp_path / "a"
    )
    first.train()
    model = first.export(tmp_path / "a" / "pipeline", 1)
    second = build_trainer("reflow_distill", model, "full", tmp_path / "b")
    second.train()
    folder = second.export(tmp_path / "b" / "pipeline")
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert saved["_class_name"] == scheduler
    assert saved["init_noise_sigma"] == 1.0
