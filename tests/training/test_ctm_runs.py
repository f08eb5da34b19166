"""CTM and TCD runs: what stock Diffusers samples at every gamma, and what is refused.

`export` loads each folder in Diffusers and compares its image with the sampler's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import TinyData, build_trainer, fingerprint, teacher_dir

from stepdistill import TrainConfig, Tuning
from stepdistill.families.registry import load_family
from stepdistill.trainers import TrajectorySegmentedTrainer


def make(teacher: Path, folder: Path, method: str, data: Any = None, layout="lora", **options):
    args = TrainConfig(
        output_dir=str(folder), disable_progress_bar=True, train_batch_size=2, max_train_steps=1,
        learning_rate=1e-3, tuning=Tuning(student=layout, rank=2),
    )  # fmt: skip
    if data is None:
        data = TinyData(load_family(teacher).sample_shape(), "prompt", ("x0",))
    gan = options.pop("gan_dataset", None)
    return TrajectorySegmentedTrainer(str(teacher), args, data, method, options, gan_dataset=gan)


def saved(folder: Path) -> tuple[dict, str]:
    record = json.loads((folder / "distillation.json").read_text())
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return record, config["_class_name"]


TCD = ("DDIMScheduler", "TCDScheduler", "TCDScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchTCDScheduler", "FlowMatchLCMScheduler")


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "family", "schedulers"), [("ctm", "sd3", FLOW), ("tcd", "sd_v", TCD)]
)
def test_one_student_exports_at_every_gamma_and_step_count(
    method, family, schedulers, tmp_path, tmp_path_factory
) -> None:
    options = {"sampler": "tcd", **({"solver_steps": 1} if method == "ctm" else {})}
    trainer = make(
        teacher_dir(family, tmp_path_factory), tmp_path / "run", method, None, "lora", **options
    )
    trainer.train()
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        noise = torch.randn(param.shape, generator=generator)
        param.data += 0.05 * noise * (param.data.std() + 0.1)
    for gamma, scheduler in zip((0.0, 0.3, 1.0), schedulers, strict=True):
        trainer.method.config = trainer.method.config.model_copy(update={"gamma": gamma})
        for num_steps in (1, 2, 4, 8):
            folder = trainer.export(tmp_path / f"{gamma}-{num_steps}", num_steps=num_steps)
            record, name = saved(folder)
            assert (name, record["num_inference_steps"]) == (scheduler, num_steps)
            assert record["call"] == ({"eta": gamma} if name == "TCDScheduler" else {})


@pytest.mark.full
@pytest.mark.parametrize("case", ["tcd_told", "ctm_bootstrap"])
def test_a_student_that_is_told_its_end_resumes_and_is_not_exported(
    case, tmp_path, tmp_path_factory
) -> None:
    teacher, more = teacher_dir("sd3", tmp_path_factory), {"checkpointing_steps": 1}
    with pytest.warns(UserWarning, match="end_input: .* export will be refused"):
        trainer = build_trainer(case, teacher, "full", tmp_path / "a", **more)
    name = "time_text_embed.timestep_embedder.cond_proj.weight"
    assert not trainer.bank.members("student")[name].any()
    trainer.train()
    assert trainer.bank.members("student")[name].any()
    resumed = build_trainer(
        case, teacher, "full", tmp_path / "a",
        resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"),
    )  # fmt: skip
    resumed.train()
    for role in set(trainer.bank.roles) - {"teacher"}:
        states = (fingerprint(one.bank.members(role)) for one in (resumed, trainer))
        assert next(states) == next(states)
    with pytest.raises(ValueError, match=r"no stock pipeline says that.*end_input: false"):
        trainer.export(tmp_path / "out")


PROMPTS = ["a cat"]


@pytest.mark.parametrize(
    ("family", "method", "options", "message"),
    [
        ("sd3", "ctm", {"end_input": True}, "expected full of a student with extra inputs"),
        ("sd3", "tcd", {"end_input": True}, "expected full of a student with extra inputs"),
        ("dit", "ctm", {"end_input": True, "layout": "full"}, "told where a jump ends.*end_input"),
        ("sd3", "ctm", {"data": PROMPTS}, "Train on images"),
        ("sd3", "tcd", {"data": PROMPTS}, "Train on images"),
        (
            "sd3",
            "ctm",
            {"gan": {"weight_g": 0.1}, "gan_dataset": PROMPTS},
            "data.gan: expected real samples",
        ),
        ("sd3", "ctm", {"num_steps": 41}, "num_steps: expected at most num_grid = 40"),
        ("sd3", "tcd", {"num_steps": 41}, "up to 40"),
        ("sd_v", "ctm", {"num_grid": 18}, "num_grid: expected a divisor of the 1000-step table"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_weights_load(
    family, method, options, message, tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    data = TinyData((4, 4, 4), "label" if family == "dit" else "prompt", ("x0",))
    with pytest.raises(ValueError, match=message) as error:
        make(teacher, tmp_path / "run", method, **{"data": data, **options})
    assert len(str(error.value).splitlines()) == 1
