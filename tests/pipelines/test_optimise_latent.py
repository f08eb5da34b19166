"""A few-step student steered by its first noise, with Diffusers alone."""

# Shapes: B batch, A audio channels, T samples, C channels, L length.

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from support.runs import fingerprint

from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.export.schedulers import stock_sampler
from stepdistill.families.stable_audio import StableAudioFamily
from stepdistill.testing.tiny import tiny_sd
from stepdistill.testing.tiny_audio import tiny_ace_step, tiny_stable_audio

FILE = Path(__file__).parents[2] / "pipelines" / "optimise_latent.py"
_spec: Any = importlib.util.spec_from_file_location("optimise_latent", FILE)
module: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(module)
TOLD = {"num_inference_steps": 4, "guidance_scale": 1.0}
ACE = {**TOLD, "audio_duration": 2.0}  # two seconds at 64 Hz, 16 latents


def student_of_stable_audio(kind: str) -> Any:
    """The stock class under a student's scheduler."""
    pipeline = tiny_stable_audio()
    family, grid = StableAudioFamily(pipeline), uniform_grid(4)
    spec = SamplerSpec(grid, kind, trained_times=grid)
    scheduler = stock_sampler(pipeline.scheduler, family.path, spec).scheduler
    net = family.net_for(pipeline.transformer, scheduler)
    pipeline.register_modules(transformer=net, scheduler=scheduler)
    return pipeline


def wrapped(pipeline: Any) -> Any:
    pipe = module.OptimiseLatentPipeline.from_pipe(pipeline)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ------------------------------------------------------------------------------- descending
def test_an_affine_map_ends_at_its_optimum() -> None:
    """One step of a Gaussian teacher is x0 = a x + b: the optimum is (y - b) / a."""
    noise, wanted = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    best, history = module._descend(
        lambda x: (0.8 * x + 0.3 - wanted).square().mean(), noise, 300, 0.1, None, lambda *_: None
    )
    torch.testing.assert_close(best, (wanted - 0.3) / 0.8, atol=1e-2, rtol=0)
    assert history[-1] < 1e-4 < history[0]


@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_the_gradient_is_that_of_all_steps(kind) -> None:
    """Against finite differences; noise between steps is the same at every call."""
    pipe = wrapped(student_of_stable_audio(kind)).to(torch.float64)
    noise, along = torch.randn(2, 1, 4, 16, dtype=torch.float64)

    def value(x: torch.Tensor) -> torch.Tensor:
        _, waves = pipe._made(("a bell",), {"guidance_scale": 1.0}, x, 4, 0, False)
        return waves.double().square().mean()

    x = noise.clone().requires_grad_()
    value(x).backward()
    h = 1e-4
    with torch.no_grad():
        slope = (value(noise + h * along) - value(noise - h * along)) / (2 * h)
    assert float((x.grad * along).sum()) == pytest.approx(float(slope), rel=1e-3)


# ----------------------------------------------------------------------------------- the call
@pytest.mark.full
def test_what_is_kept_comes_back_and_weights_stay() -> None:
    pipe = wrapped(tiny_ace_step())
    before = fingerprint(dict(pipe.transformer.named_parameters()))
    sound = pipe("a bell", **ACE, generator=torch.Generator().manual_seed(5)).audios[0]
    seen = []
    result = pipe(
        "a bell",
        loss=module.Keep(sound, [(0.0, 1.0)]),
        iterations=30,
        watch=lambda i, value: seen.append((i, value)),
        **ACE,
    )
    history = result.history
    assert len(history) == len(seen) == 31
    assert min(history) < 0.2 * history[0]
    assert fingerprint(dict(pipe.transformer.named_parameters())) == before
    again = pipe("a bell", latents=result.noise, **ACE).audios
    torch.testing.assert_close(result.audios, again)
    assert not torch.is_grad_enabled() or result.audios.grad_fn is None
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    assert "decode" not in vars(pipe.vae)
    assert "encode_prompt" not in vars(pipe)


def test_without_a_loss_it_is_the_stock_call() -> None:
    stock = student_of_stable_audio("ode")
    stock.set_progress_bar_config(disable=True)
    call = {**TOLD, "generator": torch.Generator().manual_seed(1)}
    first = stock("a bell", **call).audios
    call["generator"] = torch.Generator().manual_seed(1)
    torch.testing.assert_close(wrapped(stock)("a bell", **call).audios, first)
    assert type(wrapped(stock)).__name__ == "StableAudioPipeline"


@pytest.mark.full
def test_several_losses_and_several_surrogate_steps() -> None:
    pipe = wrapped(student_of_stable_audio("renoise"))
    losses = [(1.0, module.Centroid([(0, 200.0)])), (0.5, lambda waves, rate: waves.abs().mean())]
    result = pipe(
        "a bell", loss=losses, iterations=12, surrogate_steps=2, checkpointing=True, **TOLD
    )
    assert min(result.history) < result.history[0]


def test_images_take_any_loss() -> None:
    pipe = wrapped(tiny_sd())
    result = pipe(
        "a cube", loss=lambda images: images.mean(), iterations=5, output_type="pt",
        num_inference_steps=2, guidance_scale=0.0, height=16, width=16,
    )  # fmt: skip
    assert min(result.history) < result.history[0]
    assert result.images.shape == (1, 3, 16, 16)


def test_a_good_enough_loss_stops_it() -> None:
    pipe = wrapped(tiny_ace_step())
    result = pipe("a bell", loss=lambda w, rate: w.square().mean(), stop_below=1e9, **ACE)
    assert len(result.history) == 1


def test_from_a_folder(tmp_path) -> None:
    tiny_ace_step().save_pretrained(tmp_path / "pipe")
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "pipe", custom_pipeline=str(FILE), trust_remote_code=True
    )
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe).__name__ == "AceStepPipeline"
    result = pipe("a bell", loss=pipe.losses.Intensity([(0, -20.0)]), iterations=2, **ACE)
    assert result.audios.shape == (1, 1, 128)


# ------------------------------------------------------------------------------------- losses
def waves_of(hertz: float, rate: int = 4096, seconds: float = 1.0) -> torch.Tensor:
    time = torch.arange(int(rate * seconds)) / rate
    return torch.sin(2 * torch.pi * hertz * time).view(1, 1, -1)


def test_intensity_is_decibels_over_time() -> None:
    tone = waves_of(512.0)
    assert float(module.Intensity([(0, -3.01)])(tone, 4096)) < 1e-3
    assert float(module.Intensity([(0, -13.01)])(tone, 4096)) == pytest.approx(1.0, abs=1e-2)
    fading = tone * 10 ** (-torch.linspace(0, 1, tone.shape[-1]))
    assert float(module.Intensity([(0, -3.01), (1, -23.01)])(fading, 4096)) < 1e-2
    assert float(module.Intensity([(0, 7), (1, 7)], relative=True)(tone, 4096)) < 1e-3


def test_centroid_is_in_octaves() -> None:
    tone = waves_of(512.0)
    assert float(module.Centroid([(0, 512.0)])(tone, 4096)) < 1e-2
    assert float(module.Centroid([(0, 256.0)])(tone, 4096)) == pytest.approx(1.0, abs=0.1)


def test_structure_wants_the_same_letter_alike() -> None:
    low, high = waves_of(300.0), waves_of(1500.0)
    aba = torch.cat([low, high, low], -1)
    form = module.Structure("ABA")
    assert float(form(aba, 4096)) < 0.02
    assert float(form(torch.cat([low, low, high], -1), 4096)) > 0.3
    assert float(module.Structure("AAB")(torch.cat([low, low, high], -1), 4096)) < 0.02


def test_silence_has_a_finite_gradient() -> None:
    for loss in (
        module.Intensity([(0, -20)]), module.Centroid([(0, 300)]), module.Structure("AB"),
    ):  # fmt: skip
        silence = torch.zeros(1, 1, 2048, requires_grad=True)
        loss(silence, 4096).backward()
        assert bool(silence.grad.isfinite().all())


def test_outpainting_keeps_the_end_at_the_start() -> None:
    sound = torch.randn(2, 4096)
    keep = module.Keep.end_of(sound, 0.25, 4096)
    torch.testing.assert_close(keep.samples, sound[:, -1024:])
    assert keep.seconds == [(0.0, 0.25)]


# --------------------------------------------------------------------------------- bad input
def test_a_teachers_scheduler_is_refused() -> None:
    with pytest.raises(ValueError, match="Export a student first"):
        wrapped(tiny_stable_audio())("a bell", loss=lambda w, rate: w.mean(), **TOLD)


@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (module.Keep(torch.zeros(1, 128), [(1.0, 9.0)]), ValueError, "parts within 0 and 2 s"),
        (module.Keep(torch.zeros(1, 128), [(0.01, 0.1)]), ValueError, "a whole latent"),
        (lambda w, rate: torch.tensor(1.0), ValueError, "with a gradient"),
        (lambda w, rate: w.mean() / 0, FloatingPointError, "finite loss"),
    ],
)
def test_losses_that_can_not_be_followed(loss, error, text) -> None:
    pipe = wrapped(tiny_ace_step())
    with pytest.raises(error, match=text):
        pipe("a bell", loss=loss, iterations=2, **ACE)
    assert "decode" not in vars(pipe.vae)
    assert all(p.requires_grad for p in pipe.transformer.parameters())


def test_classes_without_noise_to_give_are_refused() -> None:
    with pytest.raises(ValueError, match="takes latents"):
        module._over("DiTPipeline")
    with pytest.raises(ValueError, match="2 to 64 letters"):
        module.Structure("A")
