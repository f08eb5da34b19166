"""Images beside x_t as channels: the x4 upscaler, InstructPix2Pix, inpainting."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import torch
from support.runs import TinyData, build_trainer, key_beside, teacher_dir
from torch import Tensor

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.types import CONDITIONING, MASK, Cond
from stepdistill.families.flux_fill import FluxFillFamily
from stepdistill.families.instruct_pix2pix import InstructPix2PixFamily
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.families.sd_inpaint import StableDiffusionInpaintFamily
from stepdistill.families.sd_upscale import StableDiffusionUpscaleFamily
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny import TINY
from stepdistill.training.batches import BatchMaker

INPAINT = ("sd_inpaint", "sdxl_inpaint", "flux_fill")
NAMES = ("sd_upscale", "instruct_pix2pix", *INPAINT)


@pytest.fixture(params=NAMES)
def beside(request, make_family):
    return make_family(request.param)


def pixels(*lead: int, channels: int = 3, size: int = 16) -> Tensor:
    """Pictures of whole 8-bit levels (*lead, channels, size, size)."""
    shape = (*lead, channels, size, size)
    levels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1.0


def images_for(family, bsz: int) -> dict[str, Tensor]:
    """What the family reads, each row another picture of the size of its images."""
    size = family.image_size()[0]
    images = {"image": pixels(bsz, size=size)}
    if "mask" in family.reads:
        images["mask"] = torch.zeros(bsz, 1, size, size)
        for row in range(bsz):
            images["mask"][row, :, : size // 2, : size // (row + 1)] = 1.0
    return images


def given(family, prompts, images: dict[str, Tensor]) -> Cond:
    return family.with_images(family.encode_text(prompts), images, family.sample_shape())


def answer(family, cond: Cond, net: Any = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, *family.sample_shape(), generator=generator).expand(cond.bsz, -1, -1, -1)
    with torch.no_grad():
        return family.forward(net or family.net, x_t, torch.full((cond.bsz,), 700.0), cond)


# ------------------------------------------------------------------------------------- conditions
def test_another_picture_makes_another_output(beside) -> None:
    cond = given(beside, ["a", "a"], images_for(beside, 2))
    one, two = answer(beside, cond)
    assert float((one - two).abs().max()) > 1e-3
    # A row's bits are its own, whatever stands beside it: also the random numbers in it.
    alone = given(beside, ["a"], {n: v[1:] for n, v in images_for(beside, 2).items()})
    for name in beside.image_keys:
        assert torch.equal(cond[name][1:], alone[name]), name


def test_the_null_keeps_the_images_and_drops_the_text(beside) -> None:
    cond = given(beside, ["a", "two cats"], images_for(beside, 2))
    null = beside.null_for(cond)
    assert set(null.tensors) == set(cond.tensors)
    for name in beside.image_keys:
        assert torch.equal(null[name], cond[name]), name
    assert not torch.equal(null["prompt_embeds"], cond["prompt_embeds"])


def test_batches_have_them_and_no_method_sees_them(beside) -> None:
    images = images_for(beside, 2)
    raw = {"index": [0, 1], "prompt": ["a", "b"], CONDITIONING: images["image"]}
    raw |= {MASK: images["mask"]} if "mask" in images else {}
    batch = BatchMaker(beside, torch.device("cpu"))(raw)
    assert batch.has() == {"cond", "null", "prompts"}
    expected = given(beside, ["a", "b"], images)
    assert set(batch.cond.tensors) == set(expected.tensors)
    for name in beside.image_keys:
        assert torch.equal(batch.cond[name], expected[name]), name
        assert torch.equal(batch.null[name], batch.cond[name]), name


def test_pictures_follow_the_size_of_the_latents(beside) -> None:
    """Of a bucket, or another resolution, in validation as in training."""
    wide = beside.sample_shape(32, 64)
    cond = beside.with_images(beside.encode_text(["a"]), images_for(beside, 1), wide)
    assert cond["channels"].shape[-2:] == wide[1:]
    assert beside.encode_at(["a"], wide)["channels"].shape[-2:] == wide[1:]


def test_small_images_of_their_own_size_reach_the_upscaler_as_they_are(make_family) -> None:
    family = make_family("sd_upscale")
    family.noise_level = 0  # index 0 of the table, which is noise too
    small = pixels(1, size=8)
    cond = given(family, ["a"], {"image": small})
    assert cond["channels"].shape == small.shape
    alpha = family.pipeline.low_res_scheduler.alphas_cumprod[0]
    noise = (cond["channels"] - alpha.sqrt() * small) / (1 - alpha).sqrt()
    assert 0.8 < float(noise.std()) < 1.2
    assert cond["noise_level"].tolist() == [0]


def test_pix2pix_s_latents_are_the_mode_without_its_scale(make_family) -> None:
    family, images = make_family("instruct_pix2pix"), images_for(make_family("instruct_pix2pix"), 1)
    mode = family.pipeline.vae.encode(images["image"]).latent_dist.mode()
    assert torch.allclose(given(family, ["a"], images)["channels"], mode, atol=1e-5)


@pytest.mark.parametrize("name", INPAINT)
def test_another_mask_makes_another_output(name, make_family) -> None:
    family = make_family(name)
    images = images_for(family, 2)
    cond = given(family, ["a", "a"], {**images, "image": images["image"][[0, 0]]})
    one, two = answer(family, cond)
    assert float((one - two).abs().max()) > 1e-3


def test_what_is_repainted_does_not_reach_the_network(make_family) -> None:
    family = make_family("sd_inpaint")
    images = images_for(family, 2)
    images["mask"] = images["mask"][[0, 0]]
    images["image"] = torch.where(images["mask"] > 0.5, images["image"], images["image"][[0, 0]])
    family.drawn_from = torch.Generator().manual_seed(0)
    one, two = (given(family, ["a"], {n: v[i : i + 1] for n, v in images.items()}) for i in (0, 1))
    assert not torch.equal(one["channels"], two["channels"])  # drawn one after the other
    family.drawn_from.manual_seed(0)
    again = given(family, ["a"], {n: v[1:] for n, v in images.items()})
    assert torch.equal(one["channels"], again["channels"])
    assert one["channels"][0, 0].tolist() == images["mask"][0, 0, ::2, ::2].tolist()


def test_masked_latents_are_drawn_once_and_scaled(make_family) -> None:
    """From their posterior, by the picture's content: the same in a run that is resumed."""
    family = make_family("sd_inpaint")
    images = images_for(family, 1)
    latents = given(family, ["a"], images)["channels"][:, 1:]
    assert torch.equal(latents, given(make_family("sd_inpaint"), ["b"], images)["channels"][:, 1:])
    vae = family.pipeline.vae
    posterior = vae.encode(images["image"] * (images["mask"] < 0.5)).latent_dist
    drawn = (latents / vae.config.scaling_factor - posterior.mean) / posterior.std
    assert 0.7 < float(drawn.std()) < 1.3


def test_fill_folds_the_mask_s_pixels_under_a_latent(make_family) -> None:
    family = make_family("flux_fill")
    images = images_for(family, 1)
    folded = given(family, ["a"], images)["channels"][:, family.latent_channels :]
    assert folded.shape[1] == family.latent_px**2
    unfolded = torch.nn.functional.pixel_shuffle(folded, family.latent_px)
    assert torch.equal(unfolded, images["mask"])


# -------------------------------------------------------------------------------------- guidance
def test_pix2pix_s_guidance_is_the_stock_call_s_three_passes(make_family) -> None:
    """At its own defaults, 7.5 for the text and 1.5 for the image, from the three outputs."""
    family = make_family("instruct_pix2pix")
    assert family.guided_call(7.5) == {"image_guidance_scale": pytest.approx(1.5)}
    images = images_for(family, 2)
    cond = given(family, ["a", "b"], images)
    text_dropped = Cond({**family.null_for(cond).tensors, "imageless": torch.zeros(2)})
    neither = Cond({**text_dropped.tensors, "channels": torch.zeros_like(cond["channels"])})
    t, i, u = (answer(family, c) for c in (cond, text_dropped, neither))
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, *family.sample_shape(), generator=generator).expand(2, -1, -1, -1)
    at = family.path.time_of(torch.full((2,), 700.0).double())
    with torch.no_grad():
        guided = teacher(x_t, at, cond, family.null_for(cond), 7.5, features=("mid",))
    expected = u + 7.5 * (t - i) + 1.5 * (i - u)
    assert float((guided.raw - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert len(guided.features["mid"]) == 2


class OneNull(InstructPix2PixFamily):
    image_share = 0.0

    def guided_call(self, guidance: float) -> dict[str, Any]:
        return {}


class Scaled(InstructPix2PixFamily):
    def beside(self, *given: Any) -> Tensor:
        return super().beside(*given) * self.pipeline.vae.config.scaling_factor


class Quiet(StableDiffusionUpscaleFamily):
    def beside(self, picture, mask, generator) -> Tensor:
        return super().beside(picture, mask, torch.Generator().manual_seed(0))


class Untold(StableDiffusionUpscaleFamily):
    def run(self, net, x_t, model_t, cond, w):
        told = {**cond.tensors, "noise_level": torch.zeros_like(cond["noise_level"])}
        return super().run(net, x_t, model_t, Cond(told), w)


class Mode(StableDiffusionInpaintFamily):
    def latents(self, images, generator=None) -> Tensor:
        return super().latents(images)


class Unmasked(StableDiffusionInpaintFamily):
    def kept_latents(self, picture, mask, generator):
        repaint, _ = super().kept_latents(picture, mask, generator)
        return repaint, self.latents(self.pixels(picture), self.generator_of(picture))


class MaskFirst(FluxFillFamily):
    def beside(self, *given: Any) -> Tensor:
        return super().beside(*given).roll(4, dims=1)


@pytest.mark.full
@pytest.mark.parametrize(
    ("wrong", "name", "row"),
    [
        (OneNull, "instruct_pix2pix", "sampling"),
        (Scaled, "instruct_pix2pix", "denoiser"),
        (Quiet, "sd_upscale", "denoiser"),
        (Untold, "sd_upscale", "encode"),
        (Mode, "sd_inpaint", "denoiser"),
        (Unmasked, "sd_inpaint", "denoiser"),
        (MaskFirst, "flux_fill", "denoiser"),
    ],
)
def test_check_finds_a_wrong_adapter(wrong, name, row) -> None:
    over = [name for name, value in check_family(wrong(TINY[name]())) if not value < LIMIT]
    assert any(name.startswith(row) for name in over)


# --------------------------------------------------------------------------------------- training
@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_a_trained_student_uses_its_picture(name, tmp_path, tmp_path_factory) -> None:
    """In memory, from the exported pipeline, and from the LoRA in the stock pipeline."""
    teacher = teacher_dir(name, tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run", learning_rate=3e-2)
    trainer.train()
    family = trainer.family
    out = trainer.export(tmp_path / "pipeline")  # compared with the sampler on its way
    record = json.loads((out / "distillation.json").read_text())
    assert record["reads"] == list(family.needs_images())
    card = (out / "README.md").read_text()
    assert "image=load_image(" in card
    assert ("mask_image=load_image(" in card) == ("mask" in family.reads)
    assert ("strength=1" in card) == (name == "sdxl_inpaint")
    exported, with_lora = load_family(out), load_family(teacher)
    with_lora.pipeline.load_lora_weights(
        str(trainer.export(tmp_path / "lora", format="lora", dtype="float32"))
    )
    prompts, images = ["a", "a"], images_for(family, 2)
    cond, student = given(family, prompts, images), trainer.bank["student"]
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, *family.sample_shape(), generator=generator).expand(2, -1, -1, -1)
    at = family.path.time_of(torch.full((2,), 700.0).double())
    with torch.no_grad():
        ours, base = student(x_t, at, cond).raw, answer(load_family(teacher), cond)
    assert float((ours[0] - ours[1]).abs().max()) > 1e-3
    saved = [answer(f, given(f, prompts, images)) for f in (exported, with_lora)]
    for made in saved:
        assert float((made - ours).abs().max()) < 1e-4
    assert float((ours - base).abs().max()) > 1e-3


@pytest.mark.full
def test_a_one_step_student_starts_at_the_last_time(tmp_path, tmp_path_factory) -> None:
    """The upscaler's own scheduler would start a single step at t = 1."""
    teacher = teacher_dir("sd_upscale", tmp_path_factory)
    trainer = build_trainer("dmd2_gan", teacher, "lora", tmp_path / "run")
    out = trainer.export(tmp_path / "pipeline")
    assert json.loads((out / "distillation.json").read_text())["visited_model_times"] == [999]
    pipeline = load_family(out).pipeline
    pipeline.scheduler.set_timesteps(1)
    assert pipeline.scheduler.timesteps.tolist() == [999]


# -------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("name", NAMES)
def test_items_without_a_picture_are_refused_before_loading(
    name, tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir(name, tmp_path_factory)
    with pytest.raises(ValueError, match=r"items with an image( and a mask)?, columns") as raised:
        build_trainer("dmd2", teacher, "lora", tmp_path, dataset=["a prompt"])
    assert "\n" not in str(raised.value)
    data = TinyData((4, 8, 8), "prompt", ("x0",), key_beside(teacher_facts(teacher).family))
    data.items[0][CONDITIONING] = torch.zeros(1, 16, 16)
    with pytest.raises(ValueError, match=r"expected images .* got \(1, 16, 16\)"):
        build_trainer("dmd2", teacher, "lora", tmp_path, dataset=data)


@pytest.mark.parametrize("name", [INPAINT[0], pytest.param(INPAINT[2], marks=pytest.mark.full)])
def test_items_without_a_mask_are_refused_before_loading(
    name, tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir(name, tmp_path_factory)
    data = TinyData((4, 8, 8), "prompt", ("x0",), CONDITIONING)
    with pytest.raises(ValueError, match="items with a mask, columns mask_file_name in") as raised:
        build_trainer("dmd2", teacher, "lora", tmp_path, dataset=data)
    assert "\n" not in str(raised.value)
    data.items[0][MASK] = torch.zeros(3, 16, 16)
    with pytest.raises(ValueError, match=r"expected masks .* got \(3, 16, 16\)"):
        build_trainer("dmd2", teacher, "lora", tmp_path, dataset=data)


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [
        ("sd_upscale", 8, r"expected in_channels 7 .* got 8\. Save it .*InstructPix2PixPipeline"),
        ("instruct_pix2pix", 4, r"expected in_channels 8 .* got 4\. It is an ordinary text-to-"),
        ("instruct_pix2pix", 5, r"expected in_channels 8 .* got 5\. .*none is served"),
        ("sd", 8, r"expected in_channels 4 .* got 8\. Save it .*InstructPix2PixPipeline"),
        ("sd_inpaint", 4, r"expected in_channels 9 .* got 4\. It is an ordinary text-to-image mod"),
        ("sdxl", 9, r"expected in_channels 4 .* got 9\. Save it .*XLInpaintPipeline"),
        ("sdxl_inpaint", 4, r"expected in_channels 9 .* got 4\. .* name StableDiffusionXLPip"),
        ("flux_fill", 16, r"expected in_channels 48 .* got 16\. .* name FluxPipeline as"),
        ("flux", 48, r"expected in_channels 16 .* got 48\. Save it .*\(FluxFillPipeline\)"),
    ],
)
def test_a_wrong_channel_count_is_refused_before_loading(
    name, channels, message, tmp_path, tmp_path_factory, no_loading
) -> None:
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_dir(name, tmp_path_factory), folder)
    file = folder / teacher_facts(folder).family.net_name / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "in_channels": channels}))
    with pytest.raises(ValueError, match=message) as raised:
        teacher_facts(folder)
    assert "\n" not in str(raised.value)


def test_several_pictures_of_a_row_are_refused(beside) -> None:
    with pytest.raises(ValueError, match="expected at most 1 image a row, got 2"):
        given(beside, ["a"], {**images_for(beside, 1), "image": torch.zeros(1, 2, 3, 16, 16)})
