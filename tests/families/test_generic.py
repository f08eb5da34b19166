"""The generic family: pipelines nobody wrote an adapter for, and those it must refuse."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline
from support.runs import METHOD_CASES, TinyData

from stepdistill import TrainConfig, Tuning
from stepdistill.export.pipeline import RECORD
from stepdistill.families.generic import GenericFamily, generic_family
from stepdistill.families.probe import flat, joined
from stepdistill.families.registry import family_for, load_family
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny import TINY
from stepdistill.testing.tiny_generic import TINY_GENERIC, tiny_lumina
from stepdistill.trainers import trainer_class

pytestmark = pytest.mark.filterwarnings("ignore:model. .* has no family of its own")


class Longest(StableDiffusionPipeline):
    """Pads to the longest prompt of a batch."""

    def encode_prompt(self, prompt, *args, **kwargs):
        embeds, null = super().encode_prompt(prompt, *args, **kwargs)
        return (embeds[:, :8] if prompt == ["a cat"] else embeds), null


class Unguided(StableDiffusionPipeline):
    """Makes no null pass, whatever the guidance."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        return False


def heard(pipeline) -> GenericFamily:
    return generic_family(type(pipeline).__name__)(pipeline)


@pytest.mark.full
@pytest.mark.parametrize("name", TINY_GENERIC)
def test_parity_without_an_adapter(name) -> None:
    rows = check_family(TINY_GENERIC[name]())
    assert len(rows) == 6
    assert {row: value for row, value in rows if not value < LIMIT} == {}


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart"])
def test_it_finds_what_the_adapters_say(name) -> None:
    """Heard from outside, the same network call as the family written for it."""
    pipeline = TINY[name]()
    own, generic = family_for(type(pipeline).__name__)(pipeline), heard(pipeline)
    assert generic.sample_shape() == own.sample_shape()
    x, t = torch.randn(2, *own.sample_shape()), torch.tensor([700.0, 20.0])
    with torch.no_grad():
        for prompts in (["a", "a longer prompt"], None):
            conds = [f.encode(prompts) if prompts else f.null(2) for f in (own, generic)]
            ours, theirs = (
                f.forward(f.net, x, t, c) for f, c in zip((own, generic), conds, strict=True)
            )
            assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.full
@pytest.mark.parametrize("name", TINY_GENERIC)
@pytest.mark.parametrize("case", ["dmd2", "lcm"])
def test_two_steps_and_export(name, case, tmp_path) -> None:
    """The exporter compares the stock pipeline's image with the in-memory sampler's."""
    TINY_GENERIC[name]().save_pretrained(tmp_path / "teacher")
    spec = METHOD_CASES[case]
    args = TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_train_steps=2,
        train_batch_size=2,
        learning_rate=1e-3,
        disable_progress_bar=True,
        tuning=Tuning(rank=2),
    )
    shape = heard(TINY_GENERIC[name]()).sample_shape()
    trainer = trainer_class(spec.method)(
        str(tmp_path / "teacher"),
        args,
        TinyData(shape, "prompt", spec.fields),
        method=spec.method,
        method_config=spec.options,
    )
    assert all(torch.isfinite(torch.tensor(v)) for v in trainer.train().values())
    out = trainer.export(tmp_path / "out", num_steps=1 if case == "dmd2" else None)
    assert json.loads((out / RECORD).read_text())["family"] == "generic"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny_lumina, "an output that is stepped with as it is, got another use"),
        (TINY["flux_schnell"], "a null row beside each prompt, got 2 rows for 2"),
        (TINY["sd"], "every prompt encoded to one length, got .*8, 16.*32, 16"),
        (TINY["sd_v"], "a null row beside each prompt, got 2 rows for 2"),
        (TINY["z_image"], "expected a denoiser of .hidden_states or sample, timestep"),
    ],
    ids=["lumina", "flux", "one_length", "no_null", "z_image"],
)
def test_what_it_cannot_serve_is_refused(build, message) -> None:
    pipeline = build()
    other = {TINY["sd"]: Longest, TINY["sd_v"]: Unguided}.get(build)
    if other is not None:
        pipeline.__class__ = other
    scheduler, decode = pipeline.scheduler, pipeline.vae.decode
    with pytest.raises(ValueError, match=message):
        generic_family(build().__class__.__name__)(pipeline)
    assert pipeline.scheduler is scheduler
    assert pipeline.vae.decode == decode
    net = pipeline.unet if other is not None else pipeline.transformer
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("name", ["FluxKontextPipeline", "DDIMPipeline", "UNet2DModel", "Zzz"])
def test_classes_that_make_no_image_from_text_are_refused(name) -> None:
    with pytest.raises(ValueError, match="expected a Diffusers pipeline from text"):
        generic_family(name)


@pytest.mark.full
def test_a_wrong_guess_is_found_by_the_check() -> None:
    """What listening took wrongly shows against the stock call."""
    for key, wrong, row in (("offset", 3.0, "denoiser"), ("slope", 2.0, "sampling")):
        family = heard(TINY_GENERIC["hunyuan_dit"]())
        object.__setattr__(family.facts, key, wrong)
        found = [name for name, value in check_family(family) if not value < LIMIT]
        assert any(name.startswith(row) for name in found)
    family = heard(TINY_GENERIC["cogview3"]())
    family._null = family.encode(["something else"])
    found = [name for name, value in check_family(family) if not value < LIMIT]
    assert found == ["sampling: 4 steps, guidance 3"]


def test_loading_says_that_nobody_wrote_an_adapter(tmp_path) -> None:
    TINY_GENERIC["cogview3"]().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"CogView3PlusPipeline has no family.*stepdistill check"):
        family = load_family(tmp_path)
    assert family.name == "generic"
    assert family.scales_input


def test_another_size_is_heard_anew() -> None:
    family = heard(TINY_GENERIC["cogview3"]())
    assert family.sample_shape() == (4, 8, 8)
    assert family.encode(["a"])["target_size"].tolist() == [[16.0, 16.0]]
    assert family.sample_shape(24, 16) == (4, 12, 8)
    assert family.encode(["a"])["target_size"].tolist() == [[24.0, 16.0]]


def test_a_discriminator_needs_a_family_of_its_own() -> None:
    assert heard(TINY_GENERIC["cogview3"]()).feature_blocks() == {}


def test_named_parts_go_back_where_they_came_from() -> None:
    call = {"a": 1, "added": {"x": 2, "y": None}}
    assert joined(flat(call)) == call
