"""Rectified-flow recipes from end to end: every stage starts from files of the one before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support.runs import _pixel_distance, teacher_dir

from stepdistill import TrainConfig, Tuning
from stepdistill.core.solvers import SamplerSpec, ode_solve, sample_x0
from stepdistill.core.times import uniform_grid
from stepdistill.export.card import call_options
from stepdistill.export.hub import files_to_push
from stepdistill.export.load import load_pipeline
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.pairs.dataset import PairDataset
from stepdistill.pairs.teacher import make_pairs
from stepdistill.testing.parity import check_family
from stepdistill.trainers import ReflowTrainer


def train(model: Any, data: Any, folder: Path, options: dict[str, Any], **more: Any) -> Any:
    """A finished two-step full run. more: method, student_config, init_student_from."""
    method, changes = more.pop("method", "reflow"), more.pop("student_config", None)
    args = TrainConfig(
        output_dir=str(folder),
        tuning=Tuning(student="full", student_config=changes),
        max_train_steps=2,
        train_batch_size=2,
        learning_rate=1e-3,
        disable_progress_bar=True,
        **more,
    )
    scorers = {"lpips": _pixel_distance} if "lpips" in options.get("loss", "") else None
    trainer = ReflowTrainer(
        str(model), args, data, method=method, method_config=options, scorers=scorers
    )
    trainer.train()
    return trainer


def pairs_of(model: Any, folder: Path, guidance: float) -> PairDataset:
    prompts = folder.with_suffix(".txt")
    labels = teacher_facts(model).conditioning == "label"
    prompts.write_text("0\n1\n" if labels else "a cat\na dog\n")
    make_pairs(
        str(model), prompts, folder, num_pairs=4, num_steps=4, guidance=guidance, batch_size=2
    )
    return PairDataset(folder)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_instaflow_from_teacher_to_one_stock_step(family, tmp_path, tmp_path_factory):
    teacher = teacher_dir(family, tmp_path_factory)
    first = pairs_of(teacher, tmp_path / "pairs1", 5.0)
    reflow = train(teacher, first, tmp_path / "a", {"stage": "reflow", "setup": "raw"})
    straight = reflow.export(tmp_path / "a" / "pipeline", 4)

    # New pairs are the straight model's own guided flow, not the first teacher's.
    second, own = pairs_of(straight, tmp_path / "pairs2", 1.5), reflow.family
    item = second[1]
    x0 = ode_solve(
        reflow.bank["student"],
        item["noise"][None],
        own.encode([item["prompt"]]),
        own.null(1),
        1.5,
        uniform_grid(4),
    )
    torch.testing.assert_close(item["x0"], x0[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(item["x0"], first[1]["x0"], atol=1e-2)

    l2 = train(straight, second, tmp_path / "b", {"stage": "distill"})
    after_l2 = str(l2.export(tmp_path / "b" / "pipeline"))
    options = {"stage": "distill", "loss": "lpips"}
    lpips = train(straight, second, tmp_path / "c", options, init_student_from=after_l2)
    folder = lpips.export(tmp_path / "c" / "pipeline")

    record = json.loads((folder / "distillation.json").read_text())
    assert record["times"] == [1.0]
    stock = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(record["load_without"]))
    stock.set_progress_bar_config(disable=True)
    noise = second[0]["noise"][None]
    cond = own.encode(["a cat"])
    latent = sample_x0(lpips.bank["student"], lpips.method.sampler(1), noise, cond)
    before = sample_x0(l2.bank["student"], l2.method.sampler(1), noise, cond)
    made = stock(
        "a cat",
        num_inference_steps=1,
        guidance_scale=1.0,
        latents=noise.clone(),
        output_type="latent",
    ).images
    torch.testing.assert_close(made, latent, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(made, before, atol=1e-3), "the last stage moved it"
    assert max(value for _, value in check_family(straight)) < 1e-5, "a teacher that check passes"


@pytest.mark.full
def test_slimflow_distils_a_smaller_straight_student(tmp_path, tmp_path_factory):
    teacher = teacher_dir("sd", tmp_path_factory)
    data = pairs_of(teacher, tmp_path / "pairs", 2.0)
    config = json.loads((teacher / "unet" / "config.json").read_text())
    assert config["block_out_channels"] == [8, 16]
    reflow = train(
        teacher,
        data,
        tmp_path / "a",
        {"stage": "reflow", "setup": "raw", "anneal_steps": 2},
        method="slimflow",
        student_config={"block_out_channels": [8, 8]},
    )
    straight = reflow.export(tmp_path / "a" / "pipeline", 1)
    distil = train(
        straight,
        data,
        tmp_path / "b",
        {"stage": "distill", "loss": "l2_lpips", "start_time": 0.999},
        method="slimflow",
    )
    sizes = [
        sum(p.numel() for p in trainer.bank.members("student").values())
        for trainer in (reflow, distil)
    ]
    # The export has a guidance input of zeros, which its own student keeps.
    assert max(sizes) < 1.1 * sizes[0] < sum(p.numel() for p in reflow.family.net.parameters())
    folder = distil.export(tmp_path / "b" / "pipeline")
    stock = DiffusionPipeline.from_pretrained(folder)
    assert stock.unet.config.block_out_channels == [8, 8]
    record = json.loads((folder / "distillation.json").read_text())
    assert record["call"] == {"sigmas": [0.999]}, "a stock call must be told the released t0"


@pytest.mark.full
def test_anchored_students_of_flow_models_export_in_two_steps(tmp_path, tmp_path_factory):
    teacher = teacher_dir("sd3", tmp_path_factory)
    data = pairs_of(teacher, tmp_path / "pairs", 1.0)
    options = {"perceptual": "none", "sampler": "anchored", "num_steps": 2}
    trainer = train(teacher, data, tmp_path / "a", options, method="rfpp")
    folder = trainer.export(tmp_path / "out")  # compared with the anchored sampler's image
    saved = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert saved["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    record = json.loads((folder / "distillation.json").read_text())
    assert record["custom_code"] is None


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "options", "name"),
    [
        ("sd3", {"sampler": "anchored"}, "AnchoredFlowMatchScheduler"),
        ("sd3", {"heun": True}, "HeunFlowMatchScheduler"),
        ("sd", {"setup": "raw", "sampler": "anchored", "heun": True}, "AnchoredHeunFlow"),
        ("sd", {"sampler": "anchored"}, "AnchoredDDIMScheduler"),
        ("flux", {"heun": True}, "HeunFlowMatchScheduler"),
        ("dit", {"setup": "raw", "heun": True}, "HeunFlow"),
        ("dit", {"heun": True}, "HeunDDIMScheduler"),
    ],
)
def test_rectified_flow_pp_samplers_export_with_their_own_scheduler(
    family, options, name, tmp_path, tmp_path_factory, monkeypatch
):
    """Stock from_pretrained of the folder, told to trust its code, makes our sampler's latents;
    what this project loads runs its own file, whatever the folder's says."""
    teacher = teacher_dir(family, tmp_path_factory)
    data = pairs_of(teacher, tmp_path / "pairs", 1.0)
    options = {"perceptual": "none", "num_steps": 3, **options}
    trainer = train(teacher, data, tmp_path / "a", options, method="rfpp")
    folder = trainer.export(tmp_path / "out")  # loaded, and compared with our sampler's image
    record = json.loads((folder / "distillation.json").read_text())
    code = folder / "scheduler" / f"{record['custom_code']}.py"
    assert len(record["visited_model_times"]) == trainer.method.sampler().num_calls
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    assert f"scheduler/{code.name}" in files_to_push(folder)

    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", tmp_path / "hf")
    without = dict.fromkeys(record["load_without"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(folder, **without)
    stock = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **without)
    assert type(stock.scheduler).__name__.startswith(name)
    stock.set_progress_bar_config(disable=True)
    own, spec = trainer.family, trainer.method.sampler()
    shape = own.sample_shape()
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    if family in ("sd", "sd3"):
        images = stock(
            "a cat", latents=noise.clone(), output_type="latent", **call_options(record)
        ).images
        ours = sample_x0(trainer.bank["student"], spec, noise, own.encode(["a cat"]))
        torch.testing.assert_close(images, ours, rtol=1e-3, atol=1e-3)
        euler = SamplerSpec(spec.times, "ode")
        other = sample_x0(trainer.bank["student"], euler, noise, own.encode(["a cat"]))
        assert (other - ours).abs().max() > 1e-3

    code.write_text("raise SystemExit('the folder was run')\n")
    assert type(load_family(folder).pipeline.scheduler).__name__.startswith(name)
    assert type(load_pipeline(folder).scheduler).__name__.startswith(name)
    assert teacher_facts(folder).setting.kind == ("eps" if "DDIM" in name else "flow")
    with pytest.raises(ValueError, match="safetensors and text only"):
        files_to_push(folder)
