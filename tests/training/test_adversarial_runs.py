"""LADD and ADD runs: what stock Diffusers samples, a pixel network from its folder, and what is
refused early."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import PixelStandIn, TinyData, fingerprint, learned_network, teacher_dir
from transformers import Dinov2Config, Dinov2Model

from stepdistill import AdversarialTrainer, ConsistencyTrainer, RunConfig, TrainConfig, Tuning
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.planning.forecast import forecast
from stepdistill.trainers import trainer_of_run

pytestmark = pytest.mark.filterwarnings("ignore:pixels. expected a preprocessor_config")
PROMPTS = ["a cat", "a dog"]
full = partial(pytest.param, marks=pytest.mark.full)


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DINOv2 of two small layers."""
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def make(
    method: str, teacher: Path, folder: Path, layout: str = "lora", data: Any = None, **options: Any
) -> AdversarialTrainer:
    args = TrainConfig(
        output_dir=str(folder), tuning=Tuning(student=layout, rank=2), learning_rate=1e-3,
        train_batch_size=2, max_train_steps=2, disable_progress_bar=True,
        **options.pop("args", {}),
    )  # fmt: skip
    if data is None:
        kind = teacher_facts(teacher).conditioning
        data = TinyData(load_family(teacher).sample_shape(), kind, ("x0",))
    scorers = options.pop("scorers", None)
    return AdversarialTrainer(str(teacher), args, data, method, options, scorers)


@pytest.mark.full
@pytest.mark.parametrize(
    ("method", "family", "layout", "scheduler"),
    [
        ("ladd", "sd3", "lora", "FlowMatchLCMScheduler"),
        full("ladd", "sd_v", "full", "LCMScheduler"),
        full("add", "sd3", "full", "FlowMatchLCMScheduler"),
        ("add", "sd_v", "lora", "LCMScheduler"),
    ],
)
def test_a_student_exports_to_stock_schedulers(
    method, family, layout, scheduler, network, tmp_path, tmp_path_factory
) -> None:
    """`export` loads the folder in Diffusers and compares its image with the sampler's; a run found
    again exports without the pixel network its heads learned on."""
    teacher = teacher_dir(family, tmp_path_factory)
    options = {} if method == "ladd" else {"gan": {"pixels": {"network": network}}}
    trainer = make(method, teacher, tmp_path / "run", layout, num_steps=2, **options)
    heads = fingerprint(trainer.bank.members("disc"))
    before = fingerprint(trainer.bank.members("student"))
    trainer.train()
    assert all(fingerprint(trainer.bank.members("disc"))[name] != heads[name] for name in heads)
    assert fingerprint(trainer.bank.members("student")) != before
    again = trainer_of_run(tmp_path / "run")
    assert ("disc" in again.bank) == (method == "ladd")
    folder = again.export(tmp_path / "out")
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    record = json.loads((folder / "distillation.json").read_text())
    assert (saved["_class_name"], record["num_inference_steps"]) == (scheduler, 2)


@pytest.mark.full
@pytest.mark.parametrize("warm", [0, 1])
def test_a_run_on_a_pixel_network_goes_on_exactly(
    warm, network, tmp_path, tmp_path_factory
) -> None:
    """Where it was cut a warm start has just ended, or there was none."""
    teacher = teacher_dir("sd3", tmp_path_factory)
    options = {
        "gan": {"pixels": {"network": network}},
        "warm_start": {"updates": warm, "teacher_steps": 2},
    }
    whole = make("add", teacher, tmp_path / "whole", **options)
    whole.train()
    make("add", teacher, tmp_path / "cut", **options).train(until=1)
    resumed = {"args": {"resume_from_checkpoint": "latest"}}
    cut = make("add", teacher, tmp_path / "cut", **options, **resumed)
    cut.train()
    for role in ("student", "disc"):
        ends = [fingerprint(trainer.bank.members(role)) for trainer in (whole, cut)]
        assert ends[0] == ends[1]


@pytest.mark.full
def test_teacher_s_own_pairs_are_real_samples(tmp_path, tmp_path_factory) -> None:
    """Guided samples that it made carry its guidance; noise beside them does no harm."""
    teacher = teacher_dir("sd3", tmp_path_factory)
    shape = load_family(teacher).sample_shape()
    data = TinyData(shape, "prompt", ("x0", "noise"))
    logs = make("ladd", teacher, tmp_path / "run", data=data, num_steps=1).train()
    assert {"gan_g", "gan_d"} <= {name.rpartition("/")[2] for name in logs}


@pytest.mark.full
def test_a_plan_knows_both_phases(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    run = RunConfig(
        pretrained_model_name_or_path=str(teacher), method="ladd", resolution=16,
        method_config={"disc_steps": 4}, tuning={"student": "lora"},
    )  # fmt: skip
    plan = forecast(run)
    assert [(cost.phase, cost.repeat) for cost in plan.phases] == [("student", 1), ("disc", 4)]
    assert set(plan.trained) == {"student", "disc"}
    options = {"gan": {"pixels": {"network": str(learned_network(tmp_path))}}}
    again = forecast(run.model_copy(update={"method": "add", "method_config": options}))
    assert [cost.phase for cost in again.phases] == ["student", "disc"]
    assert again.judges > 0
    options = {"warm_start": {"updates": 4, "teacher_steps": 8}}
    warm = forecast(run.model_copy(update={"method_config": options, "max_train_steps": 8}))
    plain = forecast(run.model_copy(update={"method_config": {}, "max_train_steps": 8}))
    told = [(cost.phase, cost.since) for cost in warm.phases]
    assert told == [("student", 0), ("student", 4), ("disc", 4)]
    assert warm.phases[1].flops == plain.phases[0].flops < warm.phases[0].flops


def test_each_facade_serves_its_own(tmp_path, tmp_path_factory) -> None:
    assert AdversarialTrainer.methods() == ("add", "ladd")
    teacher, args = teacher_dir("sd3", tmp_path_factory), TrainConfig(output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="Use AdversarialTrainer"):
        ConsistencyTrainer(str(teacher), args, PROMPTS, "ladd")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("add", {}, "gan.pixels.network: expected a folder or Hub id of a vision model, got none"),
        ("add", {"gan": {"pixels": {"network": "no/such"}}}, "no such Hub id at hand"),
        ("add", {"scorers": {"pixels": torch.nn.Identity()}}, "whose hidden states heads read"),
        ("ladd", {"scorers": {"pixels": PixelStandIn()}}, "scorers: expected names the method"),
        ("ladd", {"data": PROMPTS}, "expected batch fields .* Train on images"),
        ("ladd", {"data": PROMPTS, "rollout": "simulate"}, "Give the GAN images"),
        ("ladd", {"gan": {"source": "fake"}}, "gan.source"),
        ("ladd", {"student_times": (0.5, 1.0)}, "student_times: expected descending"),
    ],
)
def test_what_cannot_be_trained_is_one_line_before_weights_load(
    method, options, message, tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    options = {"data": TinyData((4, 4, 4), "prompt", ("x0",)), **options}
    with pytest.raises((ValueError, TypeError), match=message):
        make(method, teacher, tmp_path / "run", **options)


def test_guidance_of_a_model_without_null_is_refused(
    tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir("edm", tmp_path_factory)
    data = TinyData((3, 8, 8), "label", ("x0",))
    scorers = {"pixels": PixelStandIn()}
    with pytest.raises(ValueError, match=r"expected no guidance .* got guidance 3.0. Set it to 1"):
        make("add", teacher, tmp_path / "run", data=data, scorers=scorers)
