"""BOOT and SCott runs: what stock Diffusers samples, consistency inside, what is refused early."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import TinyData, fingerprint, teacher_dir

from stepdistill import ConsistencyTrainer, TrainConfig, Tuning
from stepdistill.families.registry import load_family, teacher_facts

PROMPTS = ["a cat", "a dog"]
UNGUIDED = {"guidance_range": (1.0, 1.0)}
ALONE = {"eta": 0.0, "solver_steps": 1, "gan": {"weight_g": 0.0}}
LATE = {"told_times": (0.5, 1.0)}  # the call is told its time
full = partial(pytest.param, marks=pytest.mark.full)


def make(method: str, teacher: Path, folder: Path, layout: str, data: Any = None, **options):
    args = TrainConfig(
        output_dir=str(folder), tuning=Tuning(student=layout, rank=2), learning_rate=1e-3,
        train_batch_size=2, max_train_steps=1, disable_progress_bar=True,
        **options.pop("args", {}),
    )  # fmt: skip
    if data is None:
        fields = () if method == "boot" else ("x0",)
        told = teacher_facts(teacher).conditioning
        data = TinyData(load_family(teacher).sample_shape(), told, fields)
    return ConsistencyTrainer(str(teacher), args, data, method, options)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "family", "layout", "options", "scheduler", "call"),
    [
        ("boot", "sd", "lora", dict(LATE), "LCMScheduler", {"timesteps": [499]}),
        full("boot", "sd", "lora", {}, "LCMScheduler", {}),
        full("boot", "sd_v", "full", {"told_times": (1.0, 0.5)}, "LCMScheduler", {}),
        ("boot", "dit", "full", dict(LATE), "DDIMScheduler", {}),
        full("boot", "dit", "full", {}, "LCMScheduler", {}),
        full("boot", "sd3", "lora", {}, "FlowMatchLCMScheduler", {"sigmas": [0.5]}),
        ("boot", "sd3", "full", {"told_times": (1.0, 0.5)}, "FlowMatchLCMScheduler", {}),
        full("scott", "sd3", "lora", {}, "FlowMatchLCMScheduler", {}),
        ("scott", "sd_v", "full", {}, "LCMScheduler", {}),
    ],
)
def test_a_student_exports_to_stock_schedulers(
    method, family, layout, options, scheduler, call, tmp_path, tmp_path_factory
) -> None:
    """`export` loads each folder in Diffusers and compares its image with the sampler's."""
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = make(method, teacher, tmp_path / "run", layout, **options)
    trainer.train()
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        noise = torch.randn(param.shape, generator=generator)
        param.data += 0.05 * noise * (param.data.std() + 0.1)
    folder = trainer.export(tmp_path / "out")
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    record = json.loads((folder / "distillation.json").read_text())
    steps = {"boot": 1, "scott": 2}[method]
    assert (saved["_class_name"], record["num_inference_steps"]) == (scheduler, steps)
    assert record["call"] == call
    if method == "boot":
        with pytest.raises(ValueError, match=r"num_steps: expected 1 .* got 4"):
            trainer.export(tmp_path / "four", num_steps=4)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_scott_alone_trains_the_very_student_of_consistency(
    layout, tmp_path, tmp_path_factory
) -> None:
    """Two updates without noise, further steps and a head: every weight, bit for bit."""
    teacher, shared = teacher_dir("sd3", tmp_path_factory), {"num_grid": 40, "num_steps": 2}
    students = []
    for method, options in (("scott", ALONE), ("consistency", {})):
        trainer = make(
            method, teacher, tmp_path / method, layout,
            guidance_range=(2.0, 4.0), args={"seed": 3}, **shared, **options,
        )  # fmt: skip
        before = fingerprint(trainer.bank.members("student"))
        trainer.train()
        students.append(fingerprint(trainer.bank.members("student")))
        assert students[-1] != before
    assert students[0] == students[1]


def test_a_late_first_time_is_warned_of_where_no_call_can_be_told_it(
    tmp_path, tmp_path_factory
) -> None:
    teacher = teacher_dir("wan", tmp_path_factory)
    with pytest.warns(UserWarning, match="begins at time 0.5, which WanPipeline's call cannot"):
        make("boot", teacher, tmp_path / "run", "lora")


@pytest.mark.parametrize(
    ("method", "family", "options", "message"),
    [
        ("boot", "sd3", {"num_steps": 2}, "num_steps: expected 1 .* got 2"),
        ("boot", "sd_v", {"told_times": (1.0, 0.9996)}, "told_times: expected two times that"),
        ("boot", "sd_v", {"num_grid": 3}, "num_grid: expected a divisor of the 1000-step table"),
        ("boot", "edm", {"guidance": 2.0}, "expected no guidance .* got guidance 2.0. Set it to 1"),
        ("scott", "sd3", {"data": PROMPTS}, "expected batch fields .* Train on images"),
        ("scott", "sd3", {"solver": "heun"}, "solver"),
        ("scott", "sd_v", {"num_grid": 500, **UNGUIDED}, "solver_steps: expected at most 2"),
        ("scott", "edm", {"guidance_range": (2.0, 2.0)}, "expected no guidance"),
        ("scott", "sd3", {"embed_guidance": True}, "a model that can be told its guidance"),
        ("scott", "sd3", {"num_steps": 50}, "num_steps: expected at most num_grid = 40"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_weights_load(
    method, family, options, message, tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    data = TinyData((4, 4, 4), "prompt", ("x0",)) if method == "scott" else PROMPTS
    with pytest.raises(ValueError, match=message):
        make(method, teacher, tmp_path / "run", "lora", **{"data": data, **options})
