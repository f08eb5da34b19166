"""Every configuration of scheduler_inputs.py is read by value, or refused in one line on paper."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from security.scheduler_inputs import SCHEDULERS
from support.runs import teacher_dir

from stepdistill.families.registry import load_family, teacher_facts


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """Of configurations alone: what is read is read before any weight."""
    folder = tmp_path_factory.mktemp("schedulers") / "teacher"
    ignore = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(teacher_dir("sd", tmp_path_factory), folder, ignore=ignore))


def write(teacher: Path, name: str, values: dict[str, object]) -> None:
    index = json.loads((teacher / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", name]
    (teacher / "model_index.json").write_text(json.dumps(index))
    config = {"_class_name": name, **getattr(diffusers, name)().config, **values}
    config.pop("_use_default_values", None)
    (teacher / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    SCHEDULERS,
    ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(SCHEDULERS)],
)
def test_a_configuration(teacher, name, values, expected) -> None:
    write(teacher, name, values)
    if isinstance(expected, str):
        with pytest.raises(ValueError) as refused:  # noqa: PT011 (the line is data)
            teacher_facts(teacher)
        assert expected in str(refused.value)
        assert "\n" not in str(refused.value)
        return
    setting = teacher_facts(teacher).setting
    alpha, sigma = setting.path.coeffs(torch.tensor([1.0, 0.5]))
    read = (setting.kind, setting.shift, float(alpha[0]), float(sigma[0]), float(alpha[1]))
    for got, right in zip(read, expected, strict=True):
        if right is not None:
            assert got == (right if isinstance(right, str) else pytest.approx(right, rel=1e-5))


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (["diffusers", "OddScheduler"], "has no attribute"),
        (["diffusers", "AutoencoderKL"], "got AutoencoderKL, which is no scheduler"),
    ],
)
def test_a_class_that_is_no_scheduler(teacher, entry, line) -> None:
    write(teacher, "DDIMScheduler", {})
    index = json.loads((teacher / "model_index.json").read_text())
    (teacher / "model_index.json").write_text(json.dumps({**index, "scheduler": entry}))
    with pytest.raises(ValueError, match=line):
        load_family(teacher)
