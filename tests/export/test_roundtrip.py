"""A written pipeline, loaded by stock Diffusers, makes the in-memory sampler's image.

`export_pipeline` verifies that itself and raises; these tests run it over families, tunings, step
counts and noise rules, with adapters moved off zero so that nothing passes by doing nothing.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import PeftModel
from safetensors import safe_open
from support.processes import run, run_without_package
from support.runs import THOROUGH, TWO_EXPERTS, build_trainer, teacher_dir

from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.export.lora import LORA_FILE, export_lora
from stepdistill.export.pipeline import RECORD, export_pipeline
from stepdistill.export.weights import stock_net
from stepdistill.families.registry import FAMILIES, load_family
from stepdistill.testing.tiny import TINY_FAMILY

FACTS = {"model": "base", "method": "dmd2", "step": 1, "seed": 0}


def moved(trainer, scale: float = 0.05):
    """The trainer with every student weight pushed off its start."""
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        noise = torch.randn(param.shape, generator=generator)
        param.data += scale * noise * (param.data.std() + 0.1)
    return trainer


LATENT = [name for name, family in TINY_FAMILY.items() if family.conditioning == "prompt"]
FURTHER = [name for name in LATENT if name not in THOROUGH]
SHORT = [(1, "renoise"), (2, "renoise"), (4, "ode")]
CASES = [(f, layout, *s) for f in THOROUGH for layout in ("lora", "full") for s in SHORT]
CASES += [(f, "lora", *s) for f in FURTHER for s in SHORT]


@pytest.mark.sampled("sd-full-1-renoise", "sd3-lora-2-renoise", "dit-lora-1-renoise")
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize(("family", "layout", "steps", "kind"), CASES)
def test_stock_image_equals_in_memory(
    family, layout, steps, kind, tmp_path, tmp_path_factory
) -> None:
    trainer = moved(
        build_trainer("dmd2", teacher_dir(family, tmp_path_factory), layout, tmp_path / "run")
    )
    grid = uniform_grid(steps)
    spec = SamplerSpec(grid, kind, trained_times=grid)
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    record = json.loads((out / RECORD).read_text())
    assert record["num_inference_steps"] == steps
    own = trainer.family.length_call | trainer.family.guided_call(spec.guidance)
    assert record["call"] == own, "the saved scheduler alone must visit the trained times"
    assert not list(out.rglob("*.bin"))
    with said() as words:
        DiffusionPipeline.from_pretrained(out, **dict.fromkeys(record["load_without"]))
    assert words == []


# Of Diffusers' own code: AutoencoderOobleck, FluxControlNetModel.
DEPRECATED_THERE = ("`torch.nn.utils.weight_norm` is deprecated", "`FluxPosEmbed` is deprecated")


@contextmanager
def said() -> Iterator[list[str]]:
    """What libraries warn of within, as warnings or in their logs."""
    words: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: words.append(record.getMessage())  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield words
            told = [str(one.message) for one in caught]
            words += [text for text in told if not text.startswith(DEPRECATED_THERE)]
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


@pytest.mark.full
def test_a_wrong_export_is_refused(tmp_path, tmp_path_factory, monkeypatch) -> None:
    trainer = moved(
        build_trainer("dmd2", teacher_dir("sd_v", tmp_path_factory), "lora", tmp_path / "run")
    )
    monkeypatch.setattr(
        "stepdistill.export.pipeline.stock_net", lambda bank, role: stock_net(bank, "teacher")
    )
    spec = SamplerSpec((1.0,), "renoise")
    with pytest.raises(RuntimeError, match="in-memory sampler"):
        export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_times_no_list_gives_go_into_the_call(tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer("dmd2", teacher_dir("sd", tmp_path_factory), "lora", tmp_path / "run")
    spec = SamplerSpec((0.4,), "renoise", trained_times=(0.4,))
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    assert json.loads((out / RECORD).read_text())["call"] == {"timesteps": [399]}
    assert "timesteps=[399]" in (out / "README.md").read_text()


@pytest.mark.full
def test_shifted_flow_grid_comes_from_the_saved_config(tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer("dmd2", teacher_dir("sd3", tmp_path_factory), "lora", tmp_path / "run")
    grid = uniform_grid(4, shift=3.0)
    spec = SamplerSpec(grid, "ode", trained_times=grid)
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    assert json.loads((out / RECORD).read_text())["call"] == {}
    saved = FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler")
    saved.set_timesteps(4)
    assert saved.sigmas.tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)


@pytest.mark.full
def test_raw_velocity_student_in_a_vp_pipeline(tmp_path, tmp_path_factory) -> None:
    """Stock pipelines read init_noise_sigma, which flow schedulers have only by a config entry."""
    teacher = teacher_dir("sd_v", tmp_path_factory)
    trainer = moved(build_trainer("reflow_raw", teacher, "full", tmp_path / "run"), 0.01)
    for steps in (1, 4):
        trainer.export(tmp_path / "out", num_steps=steps)
        saved = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler")
        saved.set_timesteps(steps)
        assert saved.timesteps.tolist() == [1000.0 * (steps - i) / steps for i in range(steps)]


def test_raw_velocity_student_in_dit(tmp_path, tmp_path_factory) -> None:
    """A loop that calls scale_model_input: the one flow scheduler that has it."""
    teacher = teacher_dir("dit", tmp_path_factory)
    trainer = moved(build_trainer("reflow_raw", teacher, "lora", tmp_path / "run"), 0.05)
    out = trainer.export(tmp_path / "out", num_steps=3)
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]


@pytest.mark.full
@pytest.mark.parametrize("family", ["sdxl", "pixart"])
def test_raw_velocity_student_where_the_loop_scales_its_input(
    family, tmp_path, tmp_path_factory
) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(build_trainer("reflow_raw", teacher, "lora", tmp_path / "run"), 0.01)
    out = trainer.export(tmp_path / "out", num_steps=3)
    index = json.loads((out / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]


def test_one_velocity_step_of_pixart_alpha_is_refused_with_nothing_written(
    tmp_path, tmp_path_factory
) -> None:
    """Its call takes x0 from a single step's result, which flow schedulers do not return."""
    teacher = teacher_dir("pixart", tmp_path_factory)
    trainer = build_trainer("reflow_raw", teacher, "lora", tmp_path / "run")
    for form in ("pipeline", "lora"):
        with pytest.raises(ValueError, match="expected two steps or more of a velocity student"):
            trainer.export(tmp_path / "out", num_steps=1, format=form)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(ValueError, match="expected two steps or more"):  # before any training
        build_trainer("reflow_raw_distill", teacher, "lora", tmp_path / "other")


@pytest.mark.full
@pytest.mark.parametrize("family", ["pixart_sigma", "sana"])
def test_one_velocity_step_elsewhere_is_exported(family, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(build_trainer("reflow_raw", teacher, "lora", tmp_path / "run"), 0.01)
    assert (trainer.export(tmp_path / "out", num_steps=1) / RECORD).is_file()


def test_foreign_folder_is_left_alone(tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer("dmd2", teacher_dir("sd3", tmp_path_factory), "lora", tmp_path / "run")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"with thesis\.txt\. Move it"):
        trainer.export(tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


WITH_LORA_LOADER = [name for name, family in TINY_FAMILY.items() if family.has_lora_loader()]


@pytest.mark.full
@pytest.mark.sampled_in_full("flux", "sd", "sdxl", "wan")
@pytest.mark.parametrize("family", sorted({*WITH_LORA_LOADER} - {*TWO_EXPERTS}))  # of one file
def test_lora_file_keeps_the_strength_of_alpha(family, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(build_trainer("dmd2", teacher, "lora", tmp_path / "run", alpha=7.0), 0.2)
    spec = trainer.method.sampler()
    out = export_lora(trainer.family, trainer.bank, spec, tmp_path / "lora", FACTS, dtype="float32")
    with safe_open(out / LORA_FILE, "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    # The scale is in the weights: a loader that reads no metadata takes alpha for the rank.
    assert {v for k, v in metadata.items() if k.endswith("lora_alpha")} == {2.0}

    merged = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "merged", FACTS)
    plain = load_family(teacher)
    plain.pipeline.load_lora_weights(str(out))
    expected = load_family(merged)
    x = torch.randn(2, *plain.sample_shape(), generator=torch.Generator().manual_seed(0))
    cond = plain.encode(["a", "b"])
    times = torch.tensor([999.0, 500.0])
    with torch.no_grad():
        first = plain.forward(plain.net, x, times, cond)
        second = expected.forward(expected.net, x, times, cond)
        base = load_family(teacher)
        untouched = base.forward(base.net, x, times, cond)
    assert float((first - second).abs().max()) < 1e-5
    assert float((first - untouched).abs().max()) > 1e-2


def test_lora_of_a_full_student_is_refused(tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer("dmd2", teacher_dir("sd3", tmp_path_factory), "full", tmp_path / "run")
    with pytest.raises(ValueError, match="LoRA student"):
        trainer.export(tmp_path / "out", format="lora")


@pytest.mark.sampled("dit")
# Of stable_audio the merged network has other units of time: tests/families/test_audio.py.
@pytest.mark.parametrize(
    "family", [n for n in FAMILIES if n not in (*WITH_LORA_LOADER, "stable_audio")]
)
def test_lora_without_a_loader_is_a_peft_adapter(family, tmp_path, tmp_path_factory) -> None:
    """Diffusers gives these classes no LoRA loader; PEFT reads the folder, alpha included."""
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(build_trainer("dmd2", teacher, "lora", tmp_path / "run", alpha=7.0), 0.2)
    spec = trainer.method.sampler()
    out = export_lora(trainer.family, trainer.bank, spec, tmp_path / "lora", FACTS, dtype="float32")
    code = f"PeftModel.from_pretrained(pipe.{trainer.family.net_name}, 'lora')"
    assert code in (out / "README.md").read_text()

    merged = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "merged", FACTS)
    plain, expected = load_family(teacher), load_family(merged)
    adapted = PeftModel.from_pretrained(plain.net, str(out)).merge_and_unload()
    x = torch.randn(2, *plain.sample_shape(), generator=torch.Generator().manual_seed(0))
    cond = plain.encode([0, 1] if plain.conditioning == "label" else ["a", "b"])
    times = torch.tensor([999.0, 500.0])
    with torch.no_grad():
        first = plain.forward(adapted, x, times, cond)
        second = expected.forward(expected.net, x, times, cond)
        base = load_family(teacher)
        untouched = base.forward(base.net, x, times, cond)
    assert float((first - second).abs().max()) < 1e-5
    assert float((first - untouched).abs().max()) > 1e-2


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A trainer whose student is as it starts."""
    teacher = teacher_dir("flux", tmp_path_factory)
    return build_trainer("dmd2", teacher, "full", tmp_path_factory.mktemp("flux"))


@pytest.mark.full
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (4, 3.0)])
def test_flux_scheduler_visits_the_trained_sigmas(steps, shift, flux, tmp_path) -> None:
    """The Flux call hands its scheduler linspace(1, 1/N, N) and mu: neither may move the grid."""
    grid = uniform_grid(steps, shift)
    spec = SamplerSpec(grid, "ode", trained_times=grid)
    out = export_pipeline(flux.family, flux.bank, spec, tmp_path / "out", FACTS)
    assert json.loads((out / RECORD).read_text())["call"] == {}
    saved = FlowMatchEulerDiscreteScheduler.from_pretrained(out / "scheduler")
    assert saved.config.use_dynamic_shifting is False
    assert saved.config.shift == pytest.approx(1.0 if steps == 1 else shift)
    saved.set_timesteps(sigmas=np.linspace(1.0, 1.0 / steps, steps), mu=1.15)
    assert saved.sigmas.tolist() == pytest.approx([*grid, 0.0], abs=1e-6)


@pytest.mark.full
def test_z_image_export_is_called_with_guidance_zero(tmp_path, tmp_path_factory) -> None:
    """Its call computes cond + g (cond - null): 1 would still guide."""
    teacher = teacher_dir("z_image", tmp_path_factory)
    trainer = moved(build_trainer("dmd2", teacher, "lora", tmp_path / "run"))
    for guidance in (1.0, 3.0):
        spec = SamplerSpec(uniform_grid(2), "ode", guidance=guidance)
        out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
        assert json.loads((out / RECORD).read_text())["guidance_scale"] == guidance - 1.0


@pytest.mark.full
def test_a_guided_qwen_image_student_names_its_negative_prompt(tmp_path, tmp_path_factory) -> None:
    """export_pipeline compares images, so the call as recorded guides as the sampler does."""
    teacher = teacher_dir("qwen_image", tmp_path_factory)
    trainer = moved(build_trainer("dmd2", teacher, "lora", tmp_path / "run"))
    spec = SamplerSpec(uniform_grid(2), "ode", guidance=3.0)
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    call = json.loads((out / RECORD).read_text())["call"]
    assert call == {"true_cfg_scale": 3.0, "negative_prompt": " "}


@pytest.mark.full
@pytest.mark.sampled_in_full(family=FAMILIES)
@pytest.mark.parametrize("family", FURTHER)
def test_trained_student_round_trips(family, tmp_path, tmp_path_factory) -> None:
    """Two steps of DMD2 with LoRA, exported; export_pipeline compares the reloaded image."""
    trainer = build_trainer("dmd2", teacher_dir(family, tmp_path_factory), "lora", tmp_path / "run")
    trainer.train()
    assert (trainer.export(tmp_path / "out") / RECORD).is_file()


def test_reload_needs_diffusers_alone(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd_v", tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "full", tmp_path / "run")
    trainer.train()
    out = trainer.export(tmp_path / "out")
    script = (
        "import sys\nfrom diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(out)!r})\n"
        "image = pipe('a', num_inference_steps=2, guidance_scale=1).images[0]\n"
        "assert not [m for m in sys.modules if m.startswith('stepdistill')]\n"
        "print(image.size)\n"
    )
    done = run(partial(run_without_package, script), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
