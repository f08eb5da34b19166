"""Runs of super-resolution: from pictures to a stock pipeline, and on to its decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import build_trainer, fingerprint, learned_network, teacher_dir

from stepdistill.config.decoder import DecoderOptions
from stepdistill.config.run import RunConfig
from stepdistill.core.types import CONDITIONING, EASIER
from stepdistill.data.degradation import Degradation
from stepdistill.loading.safe_files import read_tensors
from stepdistill.roles.role_denoiser import RoleDenoiser
from stepdistill.storage.files import sha256_of
from stepdistill.trainers import DistillationTrainer, train_run
from stepdistill.training.batches import BatchMaker
from stepdistill.training.decoder import tune_decoder

FAMILIES = ("sd_upscale", "instruct_pix2pix")


def pictures(tmp_path: Path, count: int = 6) -> Path:
    """A folder of pictures with detail and without captions."""
    folder = tmp_path / "pictures"
    if not folder.is_dir():
        folder.mkdir()
        draw = np.random.default_rng(0)
        for i in range(count):
            pixels = draw.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def run_of(tmp_path: Path, factory: Any, family: str = "sd_upscale", **options: Any) -> RunConfig:
    degradation = {"factor": 4, "prompt": "", **options.pop("degradation", {})}
    data = {"train_data_dir": str(pictures(tmp_path)), "degradation": degradation}
    teacher = options.pop("teacher", None) or teacher_dir(family, factory)
    return RunConfig(
        **{
            "pretrained_model_name_or_path": str(teacher),
            "method": "scale_distill",
            "output_dir": str(tmp_path / "run"),
            "data": data,
            "max_train_steps": 2,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "checkpointing_steps": 1,
            "disable_progress_bar": True,
            "tuning": {"student": "full"},
            **options,
        }
    )


# ------------------------------------------------------------------------------------- the run
@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_pictures_becomes_a_stock_one_step_pipeline(
    family, tmp_path, tmp_path_factory
) -> None:
    """The export is compared with the sampler; loaded by the stock class, one call enlarges."""
    import diffusers

    train_run(run_of(tmp_path, tmp_path_factory, family))
    folder = tmp_path / "run" / "pipeline"
    record = json.loads((folder / "distillation.json").read_text())
    assert (record["num_inference_steps"], record["visited_model_times"]) == (1, [999.0])
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    pipe.set_progress_bar_config(disable=True)
    side = 16 if family == "instruct_pix2pix" else 8
    small = Image.new("RGB", (side, side), (200, 30, 90))
    options = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "np"}
    made = [
        pipe("", image=small, generator=torch.Generator().manual_seed(0), **options).images
        for _ in range(2)
    ]
    assert (made[0] == made[1]).all()
    assert made[0].shape[1] == side * (1 if family == "instruct_pix2pix" else 4)


@pytest.mark.full
def test_its_export_is_the_next_one_s_teacher(tmp_path, tmp_path_factory) -> None:
    train_run(run_of(tmp_path, tmp_path_factory))
    first = tmp_path / "run" / "pipeline"
    more = {"teacher": first, "output_dir": str(tmp_path / "next"), "degradation": {"factor": 8}}
    train_run(run_of(tmp_path, tmp_path_factory, **more))
    assert (tmp_path / "next" / "pipeline" / "model_index.json").is_file()


@pytest.mark.full
def test_a_resumed_run_repeats_the_drawn_degradations(tmp_path, tmp_path_factory) -> None:
    options = {"degradation": {"kind": "real_esrgan"}, "method_config": {"num_steps": 2}}
    finished = DistillationTrainer.from_config(run_of(tmp_path, tmp_path_factory, **options))
    logs = finished.train()
    place = str(tmp_path / "run" / "checkpoint-1")
    options["resume_from_checkpoint"] = place
    resumed = DistillationTrainer.from_config(run_of(tmp_path, tmp_path_factory, **options))
    again = resumed.train()
    assert {**again, "steps_per_second": 0} == {**logs, "steps_per_second": 0}
    first, second = (one.bank.members("student") for one in (finished, resumed))
    assert fingerprint(first) == fingerprint(second)


@pytest.mark.full
def test_a_resume_with_other_degradations_is_refused(tmp_path, tmp_path_factory) -> None:
    DistillationTrainer.from_config(run_of(tmp_path, tmp_path_factory)).train()
    other = {"degradation": {"kind": "real_esrgan"}, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match=r"smaller by 4 \(bicubic\).*smaller by 4 \(real_esrgan"):
        DistillationTrainer.from_config(run_of(tmp_path, tmp_path_factory, **other)).train()


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_teacher_and_student_see_their_factor_under_the_same_noise(
    family, tmp_path, tmp_path_factory, monkeypatch
) -> None:
    seen: dict[str, Any] = {}
    raw = RoleDenoiser.raw

    def spy(self, x_t, t, cond, w, features):
        seen["student" if torch.is_grad_enabled() else "teacher"] = (x_t, t, cond["channels"])
        return raw(self, x_t, t, cond, w, features)

    monkeypatch.setattr(RoleDenoiser, "raw", spy)
    one = run_of(tmp_path, tmp_path_factory, family, max_train_steps=1)
    trainer = DistillationTrainer.from_config(one)
    batches: list[Any] = []
    make = BatchMaker.__call__

    def noting(maker, raw_batch, *given):
        batches.append(raw_batch)
        return make(maker, raw_batch, *given)

    monkeypatch.setattr(BatchMaker, "__call__", noting)
    trainer.train()
    (student, teacher), (raw_batch,) = (seen["student"], seen["teacher"]), batches
    assert torch.equal(student[0], teacher[0])
    assert torch.equal(student[1], teacher[1])
    assert not torch.equal(student[2], teacher[2])
    if family == "sd_upscale":  # what is left when the images are taken away: noise of one draw
        squared = trainer.family.pipeline.low_res_scheduler.alphas_cumprod[20]
        alpha, sigma = squared**0.5, (1 - squared) ** 0.5
        noises = [
            at[2] - alpha * raw_batch[key].to(at[2])
            for at, key in ((student, CONDITIONING), (teacher, EASIER))
        ]
        assert float((noises[0] - noises[1]).abs().max()) < 0.02  # eight bits of each image
        assert float(noises[0].std()) == pytest.approx(float(sigma), rel=0.2)


# ---------------------------------------------------------------------------------- wrong input
@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("sd", {}, "data.degradation.factor: expected a model that reads an image .* got Stable"),
        ("sd_upscale", {"degradation": {"factor": 2}}, "scale_distill: expected batch fields"),
        ("sd_upscale", {"resolution": 16, "degradation": {"factor": 32}}, "divisor of the images'"),
        ("sd_upscale", {"resolution": 24, "degradation": {"factor": 16}}, "divisor of the images'"),
    ],
)
def test_what_cannot_be_enlarged_is_refused(
    family, options, message, tmp_path, tmp_path_factory, monkeypatch
) -> None:
    """In one line, before a weight is loaded."""
    monkeypatch.setattr("stepdistill.training.trainer.load_family", None)
    with pytest.raises(ValueError, match=message) as caught:
        DistillationTrainer.from_config(run_of(tmp_path, tmp_path_factory, family, **options))
    assert "\n" not in str(caught.value)


def test_a_method_for_such_models_refuses_others(tmp_path, tmp_path_factory) -> None:
    for family in ("sd", "wan_i2v"):
        with pytest.raises(ValueError, match="scale_distill: expected a model that reads an image"):
            build_trainer(
                "scale_distill_images", teacher_dir(family, tmp_path_factory), "full", tmp_path
            )


# ----------------------------------------------------------------------------------- the decoder
@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    train_run(run_of(folder, tmp_path_factory, max_train_steps=1))
    return folder


def decoder_options(student: Path, out: Path, **options: Any) -> DecoderOptions:
    return DecoderOptions(
        **{
            "student": str(student / "run" / "pipeline"),
            "train_data_dir": str(student / "pictures"),
            "output_dir": str(out),
            "max_train_steps": 4,
            "train_batch_size": 2,
            "learning_rate": 1e-3,
            "gan_start": 2,
            "ema_decay": 0.5,
            **options,
        }
    )


@pytest.mark.full
def test_only_the_decoder_changes_and_stock_runs_it(student, tmp_path) -> None:
    import diffusers

    logs: dict[int, dict[str, float]] = {}
    network = str(learned_network(tmp_path))
    options = decoder_options(student, tmp_path / "sharp", network=network, max_train_steps=8)
    folder = tune_decoder(options, lambda step, values: logs.update({step: values}))
    before = student / "run" / "pipeline"
    for file in before.rglob("*.safetensors"):
        name = file.relative_to(before)
        same = sha256_of(file) == sha256_of(folder / name)
        assert same == (name.parts[0] != "vae"), name
    old, new = (read_tensors(next((f / "vae").glob("*.safetensors"))) for f in (before, folder))
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    assert moved
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in moved)
    assert set(logs[1]) == {"l1", "perceptual"}
    assert set(logs[3]) == {"l1", "perceptual", "gan", "discriminator"}
    assert logs[8]["l1"] < logs[1]["l1"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert pipe("", image=Image.new("RGB", (8, 8)), num_inference_steps=1, guidance_scale=1)
    assert json.loads((folder / "distillation.json").read_text())["decoder"]["max_train_steps"] == 8
    assert not (tmp_path / "sharp.part").exists()


@pytest.mark.full
def test_a_decoder_that_was_cut_off_goes_on_bit_for_bit(student, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("stepdistill.training.decoder.SAVE_SECONDS", 0.0)
    at_once = tune_decoder(decoder_options(student, tmp_path / "at_once"))

    def cut(step: int, logs: dict[str, float]) -> None:
        if step == 4:
            raise KeyboardInterrupt

    options = decoder_options(student, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        tune_decoder(options, cut)
    steps: list[int] = []
    folder = tune_decoder(options, lambda step, logs: steps.append(step))
    assert steps == [4]
    first, second = (next((f / "vae").glob("*.safetensors")) for f in (at_once, folder))
    assert sha256_of(first) == sha256_of(second)


@pytest.mark.full
def test_a_decoder_s_wrong_input_is_told(student, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    for options, message in (
        ({"output_dir": str(tmp_path / "mine")}, "output_dir: expected a new folder"),
        ({"degradation": Degradation(factor=64), "resolution": 16}, "divisor of the images'"),
        ({"network": str(tmp_path)}, "expected a folder or Hub id of a vision model"),
    ):
        with pytest.raises(ValueError, match=message):
            tune_decoder(decoder_options(student, tmp_path / "out", **options))
