"""What sound adds: one-dimensional latents, a trigonometric path, times of other units, waves."""

from __future__ import annotations

import contextlib
import io
import json
import wave
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from support.runs import build_trainer, teacher_dir
from torch.utils.data import Dataset

from stepdistill.core.path import TrigPath, VPPath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.core.types import Cond
from stepdistill.export.lora import export_lora
from stepdistill.export.pipeline import RECORD, export_pipeline
from stepdistill.export.run import sample_export
from stepdistill.families.ace_step import AceStepFamily
from stepdistill.families.registry import teacher_facts
from stepdistill.families.stable_audio import StableAudioFamily
from stepdistill.reporting.sound import magnitudes, read_wav, spectrogram, write_wav
from stepdistill.testing.tiny_audio import tiny_ace_step, tiny_stable_audio

FACTS = {"model": "base", "method": "dmd2", "step": 1, "seed": 0}
FAMILY = {"stable_audio": StableAudioFamily, "ace_step": AceStepFamily}
SOUND = tuple(FAMILY)


def moved(trainer):
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        noise = torch.randn(param.shape, generator=generator)
        param.data += 0.05 * noise * (param.data.std() + 0.1)
    return trainer


# ------------------------------------------------------------------------------ the path
def test_trig_path_is_edm_of_unit_data_scaled() -> None:
    path, t = TrigPath(500.0), torch.tensor([1.0, 0.7, 0.2], dtype=torch.float64)
    alpha, sigma = path.coeffs(t)
    noise = torch.tan(torch.atan(torch.tensor(500.0).double()) * t)  # of x0 + noise eps
    torch.testing.assert_close(alpha, (1 + noise**2).rsqrt())
    torch.testing.assert_close(sigma / alpha, noise)
    torch.testing.assert_close(path.model_time(t), 2 / torch.pi * torch.atan(noise))
    torch.testing.assert_close(path.time_of(path.model_time(t)), t)


def test_its_table_has_its_coefficients_and_entries() -> None:
    path, t = TrigPath(500.0), torch.tensor([1.0, 0.75, 0.5, 0.001], dtype=torch.float64)
    for ours, table in zip(path.coeffs(t), VPPath.coeffs(path, t), strict=True):
        torch.testing.assert_close(ours, table)
    assert path.entry(t).tolist() == [999, 749, 499, 0]


@pytest.mark.parametrize("rule", ["karras", "exponential"])
def test_the_stock_scheduler_steps_as_our_path_does(rule) -> None:
    """Its own SDE step, in its own coordinates, from noise that both are given; the last ends at
    x0. Of one step the Karras grid alone begins at sigma_max."""
    family = StableAudioFamily(tiny_stable_audio())
    config = family.pipeline.scheduler.config
    scheduler = type(family.pipeline.scheduler).from_config(
        config, sigma_schedule=rule, solver_order=1
    )
    scheduler.set_timesteps(1)
    sigma = float(scheduler.sigmas[0])
    assert sigma == pytest.approx(500.0 if rule == "karras" else 0.3, rel=1e-5)
    scheduler.set_timesteps(3)
    path, eps = family.path, torch.randn(3, 1, 4, 16)
    draws = iter(eps[1:])
    x = torch.randn(1, 4, 16)
    stock = x * scheduler.init_noise_sigma
    for i, told in enumerate(scheduler.timesteps):
        v, noise = torch.randn(1, 4, 16), next(draws, torch.zeros(1, 4, 16))
        t = path.time_of(told.double()).view(1)
        s = path.time_of(scheduler.timesteps[i + 1].double()).view(1) if i < 2 else torch.zeros(1)
        torch.testing.assert_close(
            scheduler.scale_model_input(stock, told), x.float(), atol=1e-5, rtol=1e-4
        )
        x = path.step(path.to_x0(v, x, t, "v"), x, t, s.double(), 1.0 if i < 2 else 0.0, noise)
        scheduler.noise_sampler = lambda *_, noise=noise: noise
        stock = scheduler.step(v, told, stock).prev_sample
    torch.testing.assert_close(stock, x.float(), atol=2e-5, rtol=1e-4)


def test_another_scheduler_tells_other_times() -> None:
    pipeline = tiny_stable_audio()
    pipeline.scheduler = EDMDPMSolverMultistepScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="CosineDPMSolverMultistepScheduler"):
        StableAudioFamily(pipeline)


# ------------------------------------------------------------------------------ condition
def test_stable_audio_null_keeps_the_length_alone() -> None:
    family = StableAudioFamily(tiny_stable_audio())
    cond, null = family.encode(["a bell"]), family.null(1)
    assert float(null["prompt_embeds"].abs().max()) == 0.0
    assert torch.equal(null["seconds"], cond["seconds"])


def test_ace_step_rows_of_other_lengths_answer_as_alone() -> None:
    """The network has no mask: padding would be heard. So are their captured features."""
    from stepdistill.config.tuning import Tuning
    from stepdistill.core.method import Role
    from stepdistill.roles.rolebank import RoleBank

    family = AceStepFamily(tiny_ace_step())
    prompts = ["a long note of a reed organ", "bell", "a long note of a reed organ"]
    cond, x_t = family.encode(prompts), torch.randn(3, 4, 16)
    assert len(set(cond["length"].tolist())) == 2
    together = Cond.cat([cond, family.null(1)])
    x_all, t = torch.cat([x_t, x_t[:1]]), torch.full((4,), 0.6).double()
    bank = RoleBank(family, {"teacher": Role(features=("mid",))}, Tuning())
    raw, features = bank["teacher"].raw(x_all, t, together, None, ("mid",))
    found = bank["teacher"].features(x_all, t, together, ("mid",))
    for i, prompt in enumerate([*prompts, None]):
        one = family.null(1) if prompt is None else family.encode([prompt])
        alone, own = bank["teacher"].raw(x_all[i : i + 1], t[:1], one, None, ("mid",))
        torch.testing.assert_close(raw[i], alone[0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(features["mid"][i], own["mid"][0], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found["mid"][i], own["mid"][0], atol=1e-6, rtol=1e-5)


def test_ace_step_shift_is_that_of_its_call() -> None:
    family = AceStepFamily(tiny_ace_step())
    assert family.shift == 3.0
    times = family.setting.own_sampler(4).times
    assert times == pytest.approx((1.0, 0.9, 0.75, 0.5))


def test_ace_step_guides_as_apg() -> None:
    """The part of the difference along the answer is left out; (B,) scales count row by row."""
    family = AceStepFamily(tiny_ace_step())
    cond, null = torch.randn(2, 2, 4, 16)
    made = family.guide(cond, null, 3.0)
    assert float(((made - cond) * cond).sum(2).abs().max()) < 1e-5
    torch.testing.assert_close(family.guide(cond, null, torch.tensor([3.0, 3.0])), made)
    torch.testing.assert_close(family.guide(cond, null, 1.0), cond)


def test_facts_need_no_weights(tmp_path_factory) -> None:
    facts = teacher_facts(teacher_dir("ace_step", tmp_path_factory))
    assert (facts.setting.shift, facts.setting.kind) == (3.0, "flow")
    facts = teacher_facts(teacher_dir("stable_audio", tmp_path_factory))
    assert isinstance(facts.setting.path, TrigPath)
    assert facts.setting.kind == "v"


# ------------------------------------------------------------------------------- export
@pytest.mark.full
@pytest.mark.parametrize("family", SOUND)
@pytest.mark.parametrize("layout", ["lora", "full"])
@pytest.mark.parametrize(("steps", "kind"), [(1, "renoise"), (2, "renoise"), (4, "ode")])
def test_stock_sound_equals_in_memory(
    family, layout, steps, kind, tmp_path, tmp_path_factory
) -> None:
    """export_pipeline compares them; a scheduler of torchsde's is not needed."""
    trainer = moved(
        build_trainer("dmd2", teacher_dir(family, tmp_path_factory), layout, tmp_path / "run")
    )
    grid = uniform_grid(steps, trainer.family.shift)
    spec = SamplerSpec(grid, kind, trained_times=grid)
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    record = json.loads((out / RECORD).read_text())
    more = {"audio_duration": 2.0} if family == "ace_step" else {}
    assert record["call"] == more
    guidance = {} if family == "ace_step" else {"guidance_scale": 1.0}
    assert record["typed"] == {"num_inference_steps": steps} | guidance | more
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"][1] != "CosineDPMSolverMultistepScheduler"


@pytest.mark.full
def test_a_grid_of_ace_steps_own_goes_into_its_call(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("ace_step", tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run")
    spec = SamplerSpec((1.0, 0.8, 0.7, 0.1), "ode", trained_times=(1.0, 0.8, 0.7, 0.1))
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    assert json.loads((out / RECORD).read_text())["call"]["timesteps"] == [1.0, 0.8, 0.7, 0.1]


@pytest.mark.full
def test_a_velocity_student_of_stable_audio(tmp_path, tmp_path_factory) -> None:
    """Told flow times in the units that the network knows."""
    teacher = teacher_dir("stable_audio", tmp_path_factory)
    trainer = moved(build_trainer("reflow_raw", teacher, "full", tmp_path / "run"))
    assert trainer.bank["student"].path.model_time(torch.ones(1)).tolist() == [1.0]
    trainer.export(tmp_path / "out", num_steps=2)


@pytest.mark.full
@pytest.mark.parametrize("family", SOUND)
def test_an_adapter_by_its_cards_code(family, tmp_path, tmp_path_factory, monkeypatch) -> None:
    """Stock Diffusers and PEFT alone: base, LoRA, scheduler, a WAV file; the sound that the
    exported pipeline makes."""
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(build_trainer("dmd2", teacher, "lora", tmp_path / "run"))
    grid = uniform_grid(2, trainer.family.shift)
    spec = SamplerSpec(grid, "ode", trained_times=grid)
    facts = {**FACTS, "model": str(teacher)}
    pipeline = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", facts)
    lora = export_lora(
        trainer.family, trainer.bank, spec, tmp_path / "lora", facts, dtype="float32"
    )
    (made,) = sample_export(pipeline, ["a prompt"], tmp_path / "made", seed=3)
    code = (lora / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    call = "pipe('a prompt', "
    assert call in code
    seeded = code.replace(call, f"{call}generator=torch.Generator().manual_seed(3), ")
    with contextlib.redirect_stdout(io.StringIO()):
        exec("import torch\n" + seeded, {})
    rate = trainer.family.sample_rate
    ours, theirs = (
        read_wav(file, rate, trainer.family.channels) for file in (made, tmp_path / "sound.wav")
    )
    assert float(ours.abs().max()) > 0.01
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=0)


# --------------------------------------------------------------------------- bad input
class Pictures(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.zeros(3, 16, 16), "prompt": "a bell"}


def test_images_and_sizes_are_refused_before_weights(
    tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir("stable_audio", tmp_path_factory)
    pictures = Pictures()
    with pytest.raises(ValueError, match="makes sound, got images from"):
        build_trainer("lcm", teacher, "lora", tmp_path / "run", dataset=pictures)
    with pytest.raises(ValueError, match="resolution: expected none beside"):
        build_trainer("dmd2", teacher, "lora", tmp_path / "run", resolution=64)
    with pytest.raises(ValueError, match="no judge of images"):
        build_trainer(
            "vsd", teacher, "lora", tmp_path / "run",
            method_options={"clip": {"weight": 0.1}}, scorers={},
        )  # fmt: skip


# --------------------------------------------------------------------------- waves
def test_waves_of_another_length_are_refused() -> None:
    family = StableAudioFamily(tiny_stable_audio())
    assert family.size_text() == "0.125 s at 1024 Hz, 2 channels"
    assert family.latents(torch.zeros(1, 2, 128)).shape == (1, 4, 16)
    with pytest.raises(ValueError, match="expected waves"):
        family.latents(torch.zeros(1, 2, 100))


def test_a_tone_is_seen_at_its_frequency() -> None:
    rate, hertz = 8000, 1000
    tone = torch.sin(2 * torch.pi * hertz * torch.arange(rate) / rate).view(1, 1, -1)
    loudest = magnitudes(tone, 512)[0].mean(1).argmax()
    assert int(loudest) == hertz * 512 // rate
    picture = spectrogram(tone)
    assert picture.shape[1] == 3
    row = int(picture[0, 0].mean(1).argmax()) / picture.shape[2]
    assert row == pytest.approx(1 - hertz / (rate / 2), abs=0.03)  # low notes at the bottom


def test_wav_files(tmp_path) -> None:
    tone = torch.sin(torch.arange(400) / 7).expand(2, -1)
    write_wav(tmp_path / "a.wav", tone, 8000)
    torch.testing.assert_close(read_wav(tmp_path / "a.wav", 8000, 2), tone, atol=1e-4, rtol=0)
    assert read_wav(tmp_path / "a.wav", 8000, 1).shape == (1, 400)
    with pytest.raises(ValueError, match="sound at 44100 Hz, as the model's, got 8000 Hz"):
        read_wav(tmp_path / "a.wav", 44100, 2)
    with wave.open(str(tmp_path / "b.wav"), "wb") as file:
        file.setparams((1, 1, 8000, 0, "NONE", ""))
        file.writeframes(np.zeros(8, np.uint8).tobytes())
    with pytest.raises(ValueError, match="16-bit PCM, got 8 bit"):
        read_wav(tmp_path / "b.wav", 8000, 1)
    (tmp_path / "c.wav").write_text("no sound")
    with pytest.raises(ValueError, match="expected a WAV file"):
        read_wav(tmp_path / "c.wav", 8000, 1)


@pytest.mark.full
def test_a_run_writes_sounds_and_spectrograms(tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer(
        "dmd2",
        teacher_dir("ace_step", tmp_path_factory),
        "lora",
        tmp_path / "run",
        validation_steps=2,
        validation_prompts=["a bell"],
        num_validation_images=2,
        validation_teacher_steps=2,
    )
    trainer.train()
    folder = tmp_path / "run" / "validation"
    made = {path.name for path in folder.iterdir()}
    assert {"teacher.png", "teacher-1.wav", "step-2.png", "step-2-0.wav"} <= made
    assert (tmp_path / "run" / "report.html").read_text().count("<audio") >= 4
