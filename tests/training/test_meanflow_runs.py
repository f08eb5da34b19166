"""MeanFlow, sCM and rCM runs: what stock Diffusers samples, and what is refused before loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import TinyData, build_trainer, fingerprint, teacher_dir

from stepdistill import ConsistencyTrainer, TrainConfig, Tuning
from stepdistill.families.registry import load_family
from stepdistill.methods.meanflow import SCM
from stepdistill.training import trainer as trainer_file

LCM, EULER = "FlowMatchLCMScheduler", "FlowMatchEulerDiscreteScheduler"


def make(teacher: Path, folder: Path, layout: str = "full", data: Any = None, **options):
    made = {"disable_progress_bar": True, "train_batch_size": 2, "max_train_steps": 1}
    tuning = options.pop("tuning", Tuning(student=layout, fake=layout, rank=2))
    args = TrainConfig(
        output_dir=str(folder), tuning=tuning, learning_rate=1e-3, **made, **options.pop("args", {})
    )
    if data is None:
        data = TinyData(load_family(teacher).sample_shape(), "prompt", ("x0",))
    return ConsistencyTrainer(str(teacher), args, data, "meanflow", {"guidance": 2.0, **options})


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "layout", "options", "steps", "scheduler"),
    [
        ("sd3", "lora", SCM, (1, 2, 4), LCM),
        ("sd_v", "full", SCM, (2,), "LCMScheduler"),
        ("sd3", "full", {"num_steps": 2}, (2,), EULER),
        ("sd_v", "lora", {"num_steps": 4}, (4,), "DDIMScheduler"),
        ("sd3", "lora", {**SCM, "matching": 1.0, "critic_steps": 1}, (2,), LCM),
    ],
)
def test_a_student_exports_to_stock_schedulers(
    family, layout, options, steps, scheduler, tmp_path, tmp_path_factory
) -> None:
    """`export` loads each folder in Diffusers and compares its image with the sampler's."""
    trainer = make(teacher_dir(family, tmp_path_factory), tmp_path / "run", layout, **options)
    trainer.train()
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        noise = torch.randn(param.shape, generator=generator)
        param.data += 0.05 * noise * (param.data.std() + 0.1)
    for num_steps in steps:
        folder = trainer.export(tmp_path / str(num_steps), num_steps=num_steps)
        saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        record = json.loads((folder / "distillation.json").read_text())
        assert (saved["_class_name"], record["num_inference_steps"]) == (scheduler, num_steps)
        assert record["call"] == {}


@pytest.mark.full
def test_general_r_trains_a_new_input_resumes_and_is_not_exported(
    tmp_path, tmp_path_factory
) -> None:
    teacher, more = teacher_dir("sd3", tmp_path_factory), {"checkpointing_steps": 1}
    with pytest.warns(UserWarning, match="export will be refused"):
        trainer = build_trainer("meanflow_general", teacher, "full", tmp_path / "a", **more)
    name = "time_text_embed.timestep_embedder.cond_proj.weight"
    assert not trainer.bank.members("student")[name].any()
    trainer.train()
    assert trainer.bank.members("student")[name].any()
    resumed = build_trainer(
        "meanflow_general", teacher, "full", tmp_path / "a",
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"),
    )  # fmt: skip
    resumed.train()
    assert fingerprint(resumed.bank.members("student")) == fingerprint(
        trainer.bank.members("student")
    )
    with pytest.raises(ValueError, match="no stock pipeline says that"):
        trainer.export(tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd3", {"r": "general", "layout": "lora"}, "expected full of a student with extra inputs"),
        ("dit", {"r": "general"}, "expected a model that can be told where a jump ends"),
        ("sd_v", {"estimator": "jvp"}, "for a teacher with a table of times"),
        ("sd3", {"estimator": "jvp", "args": {"compile": True}}, "forward .jvp., got --compile"),
        (
            "sd3",
            {"estimator": "jvp", "tuning": Tuning(student="lora", base_quantization="int8")},
            "base_quantization int8. Set --method_config.estimator backward",
        ),
        ("sd3", {"data": ["a cat"]}, "Train on images"),
        ("sd3", {"num_steps": 2, "student_times": (1.0, 0.5), "sampler": "renoise"}, "ode with r"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_weights_load(
    family, options, message, tmp_path, tmp_path_factory, monkeypatch
) -> None:
    def load(*args: Any) -> None:
        raise AssertionError("weights were loaded")

    teacher = teacher_dir(family, tmp_path_factory)
    options = {"data": TinyData((4, 4, 4), "prompt", ("x0",)), **options}
    monkeypatch.setattr(trainer_file, "load_family", load)
    with pytest.raises(ValueError, match=message):
        make(teacher, tmp_path / "run", **options)
