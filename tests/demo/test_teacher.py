"""The teacher is a stock pipeline: it builds, trains, saves, is found again, and reloads alone."""

import dataclasses
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from support.processes import run, run_without_package

from stepdistill.demo import reload
from stepdistill.demo.data import load_digit_splits
from stepdistill.demo.reload import Job, sample_in_fresh_process
from stepdistill.demo.teacher import (
    RECORD,
    Teacher,
    TeacherConfig,
    build_teacher,
    load_or_train_teacher,
)
from stepdistill.demo.teacher_training import train_denoiser
from stepdistill.evaluation.samples import PipelineSampler

SHORT = TeacherConfig(max_train_steps=6, train_batch_size=8, lr_warmup_steps=2)
PROMPTS = ["a handwritten two", "a handwritten seven", "a handwritten nine"]


@pytest.fixture(scope="module")
def train():
    return load_digit_splits().train


@pytest.fixture(scope="module")
def teacher(train, tmp_path_factory) -> Teacher:
    folder = tmp_path_factory.mktemp("demo") / "teacher"
    return load_or_train_teacher(SHORT, train, folder, progress=False)


def weights(pipeline: StableDiffusionPipeline) -> list[torch.Tensor]:
    return [*pipeline.unet.state_dict().values(), *pipeline.text_encoder.state_dict().values()]


def test_zero_terminal_snr_and_trailing_steps() -> None:
    scheduler = build_teacher(SHORT, 0.0, 1.0).scheduler
    assert scheduler.alphas_cumprod[-1] == 0
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999]


def test_one_step_from_noise_is_minus_v() -> None:
    scheduler = build_teacher(SHORT, 0.0, 1.0).scheduler
    scheduler.set_timesteps(1)
    noise, v = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(scheduler.step(v, 999, noise).prev_sample, -v, atol=1e-6)


def test_denoiser_is_small() -> None:
    assert sum(p.numel() for p in build_teacher(SHORT, 0.0, 1.0).unet.parameters()) < 200_000


def test_build_follows_the_seed_and_leaves_global_randomness_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again = (build_teacher(SHORT, 0.0, 1.0) for _ in range(2))
    other = build_teacher(dataclasses.replace(SHORT, seed=1), 0.0, 1.0)
    assert torch.equal(torch.rand(1), expected)
    assert all(map(torch.equal, weights(first), weights(again)))
    assert not all(map(torch.equal, weights(first), weights(other)))


@pytest.mark.full
def test_training_repeats_bit_for_bit(train) -> None:
    results = []
    for _ in range(2):
        pipeline = build_teacher(SHORT, -0.4, 0.75)
        train_denoiser(pipeline, train, SHORT, progress=False)
        results.append(weights(pipeline))
    assert all(map(torch.equal, *results))


@pytest.mark.full
def test_training_lowers_the_loss_and_moves_every_weight(train) -> None:
    pipeline = build_teacher(SHORT, -0.4, 0.75)
    before = [p.clone() for p in pipeline.unet.parameters()]
    config = dataclasses.replace(SHORT, max_train_steps=60)
    record = train_denoiser(pipeline, train, config, progress=False)
    assert record.steps == 60
    assert record.loss < 0.9  # starts at the data's own variance, about 1
    moved = [not torch.equal(a, b) for a, b in zip(before, pipeline.unet.parameters(), strict=True)]
    assert all(moved)


def test_seconds_end_the_training_early(train) -> None:
    config = dataclasses.replace(SHORT, max_train_steps=100_000, max_train_seconds=0.5)
    record = train_denoiser(build_teacher(config, -0.4, 0.75), train, config, progress=False)
    assert 0 < record.steps < 1000
    assert record.seconds < 5


def test_folder_is_a_stock_pipeline(teacher: Teacher) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teacher.folder)
    assert type(pipeline) is StableDiffusionPipeline
    sampler = PipelineSampler(pipeline, {"num_inference_steps": 2, "guidance_scale": 1})
    samples = sampler(PROMPTS, seed=0)
    assert samples.images.shape == (3, 1, 8, 8)
    assert samples.images.abs().max() <= 1
    assert samples.network_calls == 2
    guided = PipelineSampler(pipeline, {"num_inference_steps": 2, "guidance_scale": 3})
    assert guided(PROMPTS, 0).network_calls == 4


@pytest.mark.full
def test_equal_config_is_found_again_and_another_is_trained(train, teacher: Teacher, tmp_path):
    folder = tmp_path / "teacher"
    first = load_or_train_teacher(SHORT, train, folder, progress=False)
    again = load_or_train_teacher(SHORT, train, folder, progress=False)
    assert (first.cached, again.cached) == (False, True)
    assert again.record == first.record
    other = dataclasses.replace(SHORT, seed=4)
    assert not load_or_train_teacher(other, train, folder, progress=False).cached
    assert json.loads((folder / RECORD).read_text())["key"] == other.key()
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_foreign_folder_is_refused_and_kept(train, tmp_path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="teacher folder: expected an empty folder"):
        load_or_train_teacher(SHORT, train, tmp_path, progress=False)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.full
def test_fresh_process_draws_the_same_images(teacher: Teacher, monkeypatch) -> None:
    """Forked of this one for its imports; a start of its own is what the next but one test has."""

    def fresh(command: list[str], **options: Any) -> Any:
        return run(partial(run_without_package, Path(command[1]).read_text(), *command[2:]))

    monkeypatch.setattr(reload.subprocess, "run", fresh)
    jobs = [Job(teacher.folder, 1), Job(teacher.folder, 4)]
    one, four = sample_in_fresh_process(jobs, PROMPTS, seeds=[0, 7])
    assert (four.pipeline_class, four.scheduler_class) == (
        "StableDiffusionPipeline",
        "DDIMScheduler",
    )
    assert (one.samples[0].network_calls, four.samples[0].network_calls) == (1, 4)
    call = {"num_inference_steps": 4, "guidance_scale": 1}
    loaded = DiffusionPipeline.from_pretrained(teacher.folder)
    here = PipelineSampler(loaded, call)(PROMPTS, seed=7)
    assert torch.allclose(four.samples[1].images, here.images, atol=1e-5)


def test_folder_without_a_pipeline_is_refused_before_a_process_starts(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"got .* without model_index\.json"):
        sample_in_fresh_process([Job(tmp_path, 1)], PROMPTS, seeds=[0])


def test_fresh_process_reports_what_went_wrong(teacher: Teacher, tmp_path, monkeypatch) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('the network is upside down')")
    monkeypatch.setattr(reload, "SCRIPT", script)
    with pytest.raises(RuntimeError, match=r"status 1:\nthe network is upside down"):
        sample_in_fresh_process([Job(teacher.folder, 1)], PROMPTS, seeds=[0])


def test_fresh_sampler_refuses_this_package(tmp_path) -> None:
    """The script's own check, run with an empty job list and stepdistill already imported."""
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"threads": torch.get_num_threads(), "jobs": []}))
    spec = importlib.util.spec_from_file_location("fresh_sampler", reload.SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    try:
        spec.loader.exec_module(script)
        with pytest.raises(SystemExit, match="expected Diffusers alone"):
            script.main(str(request))
    finally:
        sys.path[:] = before
