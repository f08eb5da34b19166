"""`from_pretrained(folder)("a prompt")`: what it gives alone, family by family, and what not."""

from __future__ import annotations

import inspect
import json

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from support.runs import build_trainer, teacher_dir

import stepdistill
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.times import uniform_grid
from stepdistill.export.pipeline import RECORD, export_pipeline
from stepdistill.families.flux_guidance import fold_guidance
from stepdistill.families.registry import FAMILIES, family_for, load_family
from stepdistill.testing.parity import listen
from stepdistill.testing.tiny import TINY, TINY_FAMILY

FACTS = {"model": "base", "method": "dmd2", "step": 1, "seed": 0}


def moved(trainer):
    """The trainer with its student pushed off the teacher."""
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        param.data += 0.05 * torch.randn(param.shape, generator=generator)
    return trainer


def image_of(call, subject, **options):
    """(the call's image, the denoiser calls it made) from the default generator at seed 0."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        parts = (getattr(call, n, None) for n in ("unet", "transformer", "transformer_2"))
        nets = [part for part in parts if part is not None]
        family = family_for(type(call).__name__)
        with listen(*nets) as calls, family.encodings(call):
            name = "class_labels" if isinstance(subject, list) else "prompt"
            result = call(**{name: subject}, output_type="pt", **options)
    return family.images_in(result), calls


def in_memory(trainer, spec, subject):
    family = trainer.family
    shape = (1, *family.sample_shape())
    packed = family.pack(torch.zeros(shape)).shape
    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(0)
        latents = sample_x0(
            trainer.bank["student"],
            spec,
            family.unpack(torch.randn(packed), shape[1:])
            if family.packed_noise
            else torch.randn(shape),
            family.encode([subject]),
            fresh_noise=lambda _step: family.unpack(torch.randn(packed), shape[1:]),
        )
        return (family.images(latents) / 2 + 0.5).clamp(0, 1)


# Their calls draw noise for the picture, or a latent that nobody reads, before the start: one seed
# does not make the sampler's image. Each export has compared them from given noise.
DRAWS_BEFORE = ("flux_fill", "sd_inpaint", "sd_upscale", "sdxl_inpaint")
# Where the denoiser's config decides what it is told, a variant may be told nothing.
TOLD = [
    name
    for name, family in TINY_FAMILY.items()
    if family.conditioning != "none"
    and (name == family.name or "conditioning_in" not in vars(family))
]


@pytest.mark.full
@pytest.mark.sampled_in_full(family=FAMILIES)
@pytest.mark.parametrize("family", TOLD)
def test_defaults_make_the_few_step_image(family, tmp_path, tmp_path_factory) -> None:
    """Stock call with `typed` alone, and the importable loader with a prompt alone."""
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(build_trainer("dmd2", teacher, "lora", tmp_path / "run"))
    grid = uniform_grid(4)
    spec = SamplerSpec(grid, "renoise", trained_times=grid)
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    record = json.loads((out / RECORD).read_text())
    values = {"num_inference_steps": 4, "guidance_scale": trainer.family.stock_guidance(1.0)}
    typed = {name: values[name] for name in trainer.family.typed}
    own = trainer.family.length_call | trainer.family.guided_call(1.0)
    assert record["typed"] == {**typed, **own}

    subject = 0 if trainer.family.conditioning == "label" else "a test"
    expected, extras = in_memory(trainer, spec, subject), trainer.family.call_extras
    first = [subject] if trainer.family.conditioning == "label" else subject
    without = dict.fromkeys(record["load_without"])
    stock = DiffusionPipeline.from_pretrained(out, **without)
    assert type(stock).__module__.startswith("diffusers.")
    ours = stepdistill.load_pipeline(out)
    for pipe, options in ((stock, record["typed"]), (ours, {})):
        pipe.set_progress_bar_config(disable=True)
        image, calls = image_of(pipe, first, **{**extras, **options})
        assert len(calls) == 4
        assert family in DRAWS_BEFORE or (image - expected).abs().max() < 1e-3
        told = calls[0].cond
        if family == "z_image":  # names its rows: x.0 of the first, x.1 of the second
            assert not any(name.endswith(".1") for name in told), "a null pass was made"
        else:
            assert next(iter(told.values())).shape[0] == 1, "a null pass was made"


@pytest.mark.full
@pytest.mark.parametrize("steps", [1, 2, pytest.param(8, marks=pytest.mark.full)])
def test_sd_keeps_its_class_at_other_step_counts(steps, tmp_path, tmp_path_factory) -> None:
    trainer = moved(
        build_trainer("dmd2", teacher_dir("sd", tmp_path_factory), "full", tmp_path / "run")
    )
    spec = SamplerSpec(uniform_grid(steps), "renoise")
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    assert json.loads((out / RECORD).read_text())["typed"] == {"num_inference_steps": steps}
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.full
@pytest.mark.parametrize(("family", "limit"), [("sdxl", 0.0), ("flux", 0.0), ("flux2_dev", 1e-4)])
def test_guidance_typed_by_habit_changes_nothing(family, limit, tmp_path, tmp_path_factory) -> None:
    """A user who types the teacher's guidance still gets the student's image, by one pass."""
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(build_trainer("dmd2", teacher, "full", tmp_path / "run"))
    spec = SamplerSpec((1.0,), "ode")
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    pipe = DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    extras = trainer.family.call_extras
    plain, _ = image_of(pipe, "a test", num_inference_steps=1, **extras)
    habit, _ = image_of(pipe, "a test", num_inference_steps=1, guidance_scale=9.0, **extras)
    assert float((plain - habit).abs().max()) <= limit


@pytest.mark.full
def test_guided_student_keeps_its_guidance(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd_v", tmp_path_factory)
    trainer = moved(build_trainer("dmd2", teacher, "lora", tmp_path / "run"))
    spec = SamplerSpec(uniform_grid(4), "ode", guidance=3.0)
    out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
    record = json.loads((out / RECORD).read_text())
    assert record["typed"] == {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.mark.full
def test_student_that_reads_the_guidance_keeps_its_input(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd", tmp_path_factory)
    trainer = moved(build_trainer("lcm_w", teacher, "full", tmp_path / "run"))
    for w, typed in ((6.5, {"num_inference_steps": 4}), (7.5, {})):
        spec = SamplerSpec(uniform_grid(4), w=w, boundary_scale=10.0)
        out = export_pipeline(trainer.family, trainer.bank, spec, tmp_path / "out", FACTS)
        assert json.loads((out / RECORD).read_text())["typed"] == typed  # LCM's default is 8.5
        weight = load_family(out).net.time_embedding.cond_proj.weight
        assert weight.abs().max() > 0


@pytest.mark.full
def test_a_prompt_in_first_place_is_taken_as_one(tmp_path, tmp_path_factory) -> None:
    """The stock call of Flux.2 begins with reference images."""
    trainer = build_trainer(
        "dmd2", teacher_dir("flux2", tmp_path_factory), "lora", tmp_path / "run"
    )
    pipe = stepdistill.load_pipeline(trainer.export(tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    told = {"height": 16, "width": 16, "output_type": "pt"}

    def made(*subject, **named):
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return pipe(*subject, **named, **told).images

    named = made(prompt="a cat")
    assert torch.equal(made("a cat"), named)
    assert torch.equal(made(["a cat"]), named)
    assert not torch.equal(made(Image.new("RGB", (64, 64), "red"), "a cat"), named)  # an image


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_folded_flux_guidance_is_exact(guidance) -> None:
    family = family_for("FluxPipeline")(TINY["flux"]())
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([1000.0, 500.0]), family.encode(["a", "b"])
    with torch.no_grad():
        told = family.forward(family.net, x, t, cond, w=torch.full((2,), guidance - 1))
        net = fold_guidance(family.net, guidance)
        family.pipeline.register_modules(transformer=net)
        folded = family.forward(net, x, t, cond)
    assert not family.embeds_guidance
    assert (told - folded).abs().max() < 1e-5


@pytest.mark.full
def test_loaded_class_differs_in_its_defaults_alone(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sdxl", tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run")
    out = export_pipeline(
        trainer.family, trainer.bank, SamplerSpec((1.0,)), tmp_path / "out", FACTS
    )
    pipe = stepdistill.load_pipeline(out)
    assert isinstance(pipe, diffusers.StableDiffusionXLPipeline)
    pipe.save_pretrained(tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    pipe.set_progress_bar_config(disable=True)
    assert len(image_of(pipe, "a")[1]) == 1
    assert len(image_of(pipe, "a", num_inference_steps=2)[1]) == 2  # what is typed counts
    assert inspect.signature(type(pipe).__call__) == inspect.signature(
        diffusers.StableDiffusionXLPipeline.__call__
    )


def test_loading_what_is_no_export_is_refused(tmp_path, tmp_path_factory) -> None:
    with pytest.raises(ValueError, match="expected a pipeline export"):
        stepdistill.load_pipeline(teacher_dir("sd", tmp_path_factory))
