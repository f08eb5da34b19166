"""The shift of flow models that make it from the image size, at more sizes than their own."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from support.runs import build_trainer, teacher_dir

import stepdistill
from stepdistill.core.times import uniform_grid
from stepdistill.export.pipeline import RECORD
from stepdistill.families.flux2 import DEFAULT_STEPS
from stepdistill.families.generic import generic_family
from stepdistill.families.registry import family_for
from stepdistill.testing.tiny import TINY, TINY_FAMILY
from stepdistill.testing.tiny_generic import TINY_GENERIC

DYNAMIC = [name for name, family in TINY_FAMILY.items() if family.dynamic_shift]


class Reached(Exception):
    """The denoiser: what comes after it does not matter here."""


def stop(*_args, **_kwargs):
    raise Reached


def dynamic(name: str):
    """The tiny pipeline with a shift by size."""
    pipeline = TINY[name]()
    if not pipeline.scheduler.config.get("use_dynamic_shifting"):
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def told_mu(pipeline, size: int) -> float:
    """mu that the stock call at size x size px gives its scheduler."""
    own, heard = pipeline.scheduler.set_timesteps, []

    def listen(num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None):
        heard.append(mu)
        return own(num_inference_steps, device, sigmas=sigmas, mu=mu)

    family = family_for(type(pipeline).__name__)(pipeline)
    call = {**family.call_extras, **family.size_options(size, size)}
    pipeline.scheduler.set_timesteps = listen
    handle = pipeline.transformer.register_forward_pre_hook(stop)
    with suppress(Reached):
        pipeline(prompt="a", num_inference_steps=DEFAULT_STEPS, **call)
    handle.remove()
    return heard[0]


@pytest.mark.sampled("flux", "flux2_dev", "lumina2", "qwen_image", "sd3", "z_image")
@pytest.mark.parametrize("name", DYNAMIC)
def test_shift_at_two_sizes_is_the_stock_calls(name) -> None:
    pipeline = dynamic(name)
    family = family_for(type(pipeline).__name__)(pipeline)
    first = 16 if name != "lumina2" else 64
    shifts = [family.shift_at(size, size) for size in (first, 2 * first)]
    assert [math.exp(told_mu(pipeline, size)) for size in (first, 2 * first)] == pytest.approx(
        shifts
    )
    assert (shifts[0] != shifts[1]) is (name != "lumina2")  # which counts channels as tokens
    assert family.setting.shift == family.setting_at(first).shift == shifts[0]


@pytest.mark.filterwarnings("ignore:model. .* has no family of its own")
def test_a_generic_family_hears_the_shift() -> None:
    pipeline = dynamic("sd3")
    own, generic = (
        make(pipeline) for make in (family_for("StableDiffusion3Pipeline"), _generic_sd3)
    )
    for size in (16, 24):
        assert generic.shift_at(size, size) == pytest.approx(own.shift_at(size, size))


def _generic_sd3(pipeline):
    return generic_family("StableDiffusion3Pipeline")(pipeline)


def test_fixed_shifts_do_not_follow_the_size() -> None:
    family = family_for("StableDiffusion3Pipeline")(TINY["sd3"]())
    assert family.shift_at(16, 16) == family.shift_at(32, 32) == 3.0


@pytest.mark.full
@pytest.mark.parametrize("size", [16, 32])
def test_training_and_export_take_the_shift_of_the_resolution(
    size, tmp_path, tmp_path_factory
) -> None:
    """16 px is the tiny Flux's own size; the export compares images at the size it names."""
    teacher = teacher_dir("flux", tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run", resolution=size)
    shift = trainer.family.shift_at(size, size)
    assert trainer.method.setting.shift == shift
    trainer.train()
    out = trainer.export(tmp_path / "out")
    record = json.loads((out / RECORD).read_text())
    assert record["times"] == pytest.approx(list(uniform_grid(2, shift)))
    assert record["teacher_shift"] == shift
    saved = FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler")
    assert saved.config.shift == pytest.approx(shift)
    told = {} if size == 16 else {"height": 32, "width": 32}
    assert {name: record["typed"].get(name) for name in told} == told
    assert ("32 px, not the model's own" in (out / "README.md").read_text()) is (size == 32)


@pytest.mark.full
def test_an_export_at_another_size_loads_at_that_size(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run", resolution=24)
    out = trainer.export(tmp_path / "out")
    pipe = stepdistill.load_pipeline(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a", output_type="pt").images.shape == (1, 3, 24, 24)
    assert pipe("a", output_type="pt", height=16, width=16).images.shape == (1, 3, 16, 16)
    lora = trainer.export(tmp_path / "lora", format="lora")
    assert "height=24, width=24" in (lora / "README.md").read_text()
    assert torch.isfinite(pipe("a", output_type="pt").images).all()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:model. .* has no family of its own")
def test_a_generic_export_names_another_size(tmp_path) -> None:
    pipeline = TINY_GENERIC["cogview3"]()
    pipeline.save_pretrained(tmp_path / "teacher")
    trainer = build_trainer("dmd2", tmp_path / "teacher", "lora", tmp_path / "run", resolution=24)
    record = json.loads((trainer.export(tmp_path / "out") / RECORD).read_text())
    assert record["call"] == {"height": 24, "width": 24}
