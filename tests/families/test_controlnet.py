"""Families with a ControlNet beside the denoiser: sd, sdxl, flux and sd3."""

from __future__ import annotations

import json
import shutil
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    MultiControlNetModel,
    StableDiffusionControlNetPipeline,
)
from safetensors.torch import save_file
from support.original import clip_state, denoiser_state, vae_state
from support.runs import TinyData, build_trainer, fingerprint, teacher_dir
from torch import Tensor

from stepdistill import TrainConfig
from stepdistill.config.model_at_hand import ModelAtHand
from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.types import CONDITIONING, Cond
from stepdistill.families.flux_controlnet import FluxControlNetFamily
from stepdistill.families.registry import load_encoders, load_family, teacher_facts
from stepdistill.families.residuals import unet_residuals
from stepdistill.families.sd3_controlnet import StableDiffusion3ControlNetFamily
from stepdistill.families.sd_controlnet import StableDiffusionControlNetFamily
from stepdistill.loading.source import ModelSource
from stepdistill.roles.rolebank import RoleBank
from stepdistill.roles.student_net import check_student_config
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny import TINY
from stepdistill.testing.tiny_control import tiny_flux_controlnet, tiny_sd3_controlnet
from stepdistill.training.batches import BatchMaker
from stepdistill.training.step import place

UNTOLD_FLUX = partial(tiny_flux_controlnet, guidance_embeds=False)
BASES = ("sd_controlnet", "sdxl_controlnet", "flux_controlnet", "sd3_controlnet")


@pytest.fixture(params=BASES)
def controlled(request, make_family):
    return make_family(request.param)


def pixels(count: int, side: int = 16) -> Tensor:
    """Pictures of whole 8-bit levels (count, 3, side, side)."""
    shape, generator = (count, 3, side, side), torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, generator=generator) / 127.5 - 1.0


def with_control(family, prompts, images: Tensor, shape: Any = None) -> Cond:
    cond = family.encode_text(prompts)
    return family.with_images(cond, {"control": images}, shape or family.sample_shape())


def answer(family, cond: Cond, net: Any = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, *family.sample_shape(), generator=generator).expand(cond.bsz, -1, -1, -1)
    with torch.no_grad():
        return family.forward(net or family.net, x_t, torch.full((cond.bsz,), 700.0), cond)


# ------------------------------------------------------------------------------------- conditions
def test_another_control_image_makes_another_output(controlled) -> None:
    cond = with_control(controlled, ["a", "a"], pixels(2))
    one, two = answer(controlled, cond)
    assert float((one - two).abs().max()) > 1e-2
    alone = with_control(controlled, ["a"], pixels(2)[1:])
    assert torch.equal(cond["control"][1:], alone["control"])


def test_the_null_keeps_the_control_image_and_drops_the_text(controlled) -> None:
    cond = with_control(controlled, ["a", "two cats"], pixels(2))
    null = controlled.null_for(cond)
    assert set(null.tensors) == set(cond.tensors)
    assert torch.equal(null["control"], cond["control"])
    assert not torch.equal(null["prompt_embeds"], cond["prompt_embeds"])
    stand_in = controlled.encode(["a"])["control"]
    assert torch.equal(
        controlled.null(2)["control"], stand_in.repeat(2, *[1] * (stand_in.ndim - 1))
    )


def test_pixels_of_a_unet_s_are_colours_in_0_1(make_family) -> None:
    image = pixels(1)
    control = with_control(make_family("sd_controlnet"), ["a"], image)["control"]
    assert torch.allclose(control, image / 2 + 0.5, atol=1e-6)


def test_batches_of_another_size_have_control_of_that_size(controlled) -> None:
    raw = {
        "index": [0, 1],
        "prompt": ["a", "b"],
        CONDITIONING: pixels(2, 32),
        "size": [(32, 24)] * 2,
    }
    batch = BatchMaker(controlled, torch.device("cpu"))(raw)
    assert batch.shape == (4, 16, 12)
    assert torch.equal(batch.null["control"], batch.cond["control"])
    x_t, t = torch.randn(2, *batch.shape), torch.full((2,), 700.0)
    with torch.no_grad():
        out = controlled.forward(controlled.net, x_t, t, batch.cond)
    assert out.shape == x_t.shape
    stand_in = controlled.encode_at(["a"], batch.shape)["control"]
    assert stand_in.shape == batch.cond["control"][:1].shape


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "expected items with a control, columns conditioning_file_name"),
        ({"control": torch.zeros(1, 4, 16, 16)}, r"got \(4, 16, 16\)"),
        ({"control": torch.zeros(1, 2, 3, 16, 16)}, "expected at most 1 image a row, got 2"),
    ],
)
def test_wrong_images_are_refused_in_a_line(images, message, make_family) -> None:
    family = make_family("sd_controlnet")
    with pytest.raises(ValueError, match=message) as raised:
        family.with_images(family.encode_text(["a"]), images, family.sample_shape())
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------- networks
def roles_of(family) -> RoleBank:
    roles = {"teacher": Role(), "student": Role(train=True), "fake": Role(train=True)}
    return RoleBank(family, roles, Tuning(student="full", fake="lora", rank=2))


def test_one_frozen_copy_hears_each_role_s_own_call(controlled) -> None:
    bank, side = roles_of(controlled), controlled.pipeline.controlnet
    weights = {id(p) for p in side.parameters()}
    assert not any(p.requires_grad for p in side.parameters())
    assert not weights & {id(p) for p in bank.parameters()}
    assert all(not any("controlnet" in name for name in bank.stored(role)) for role in bank.roles)
    calls: list[tuple[Tensor, Tensor]] = []

    def hear(_m: Any, args: Any, kwargs: Any) -> None:
        x_t = args[0] if args else kwargs["hidden_states"]
        calls.append((x_t, args[1] if args else kwargs["timestep"]))

    side.register_forward_pre_hook(hear, with_kwargs=True)
    cond = controlled.encode(["a"])
    for number, role in enumerate(bank.roles):
        x_t = torch.full((1, *controlled.sample_shape()), float(number))
        bank[role](x_t, torch.full((1,), 0.2 + 0.3 * number).double(), cond)
    assert [float(x_t.mean()) for x_t, _ in calls] == [0.0, 1.0, 2.0]
    assert len({float(time) for _, time in calls}) == 3


def test_gradients_reach_x_t_through_it(controlled) -> None:
    """As by finite differences, whose step a network with detached residuals would miss."""
    family, double = controlled, torch.float64
    for net in (family.net, *family.side_parts.values()):
        net.to(double)
    cond = family.encode(["a"]).to(dtype=double)
    generator = torch.Generator().manual_seed(0)
    x_t, along, weight = torch.randn(3, 1, *family.sample_shape(), generator=generator).to(double)

    def value(x: Tensor) -> Tensor:
        return (family.forward(family.net, x, torch.full((1,), 600.0), cond) * weight).sum()

    x = x_t.clone().requires_grad_()
    slope = float((torch.autograd.grad(value(x), x)[0] * along).sum())
    with torch.no_grad():
        ends = [float(value(x_t + step * along)) for step in (1e-4, -1e-4)]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5)


def test_it_goes_where_the_denoiser_goes(make_family, tmp_path) -> None:
    """Offloaded encoders leave it on the device, in the frozen denoiser's dtype."""
    family = make_family("sd_controlnet")
    bank = RoleBank(family, {"student": Role(train=True)}, Tuning(rank=2))
    args = TrainConfig(output_dir=str(tmp_path), mixed_precision="bf16", offload_encoders=True)
    place(bank, args, torch.device("meta"))
    (side,) = family.side_parts.values()
    assert {(p.device.type, p.dtype) for p in side.parameters()} == {("meta", torch.bfloat16)}
    assert family.pipeline.vae.device.type == "cpu"


def test_a_mixed_dtype_is_brought_together(controlled) -> None:
    """A full student in float32 under a frozen ControlNet in bfloat16."""
    bank = roles_of(controlled)
    controlled.pipeline.controlnet.to(torch.bfloat16)
    x_t, t = torch.randn(1, *controlled.sample_shape()), torch.full((1,), 0.5).double()
    raw = bank["student"](x_t, t, controlled.encode(["a"])).raw
    assert raw.dtype == torch.float32
    assert raw.isfinite().all()


@pytest.mark.full
def test_encoders_are_loaded_without_its_weights(tmp_path_factory) -> None:
    family = load_encoders(teacher_dir("sd_controlnet", tmp_path_factory), torch.device("cpu"))
    (side,) = family.side_parts.values()
    assert len({p.data_ptr() for p in side.parameters()}) == 1
    assert family.encode(["a"])["control"].shape == (1, 3, 16, 16)


def test_a_smaller_student_keeps_what_they_share(make_family) -> None:
    family = make_family("sd_controlnet")
    with pytest.raises(ValueError, match="other values of block_out_channels"):
        check_student_config({"block_out_channels": [8, 8]}, family)
    check_student_config({"num_layers": 2}, make_family("flux_controlnet"))


# ----------------------------------------------------------------------------------------- parity
class Shifted(StableDiffusionControlNetFamily):
    def control_of(self, pixels):
        return 2 * pixels - 1


class Untold(StableDiffusionControlNetFamily):
    def residuals(self, cond, args, kwargs):
        return unet_residuals(self.pipeline.controlnet, args, kwargs, cond["control"], 0.5)


class InstantX(StableDiffusion3ControlNetFamily):
    _as_instantx = False


class NullText(FluxControlNetFamily):
    image_keys = ("control",)


@pytest.mark.full
@pytest.mark.parametrize(
    ("wrong", "build", "row"),
    [
        (Shifted, TINY["sd_controlnet"], "encode"),
        (Untold, TINY["sd_controlnet"], "encode"),
        (InstantX, TINY["sd3_controlnet"], "encode"),
        (NullText, UNTOLD_FLUX, "sampling"),
    ],
)
def test_check_finds_a_wrong_adapter(wrong, build, row) -> None:
    failed = [name for name, value in check_family(wrong(build())) if not value < LIMIT]
    assert any(name.startswith(row) for name in failed)


@pytest.mark.full
@pytest.mark.parametrize(
    "build",
    [
        partial(tiny_flux_controlnet, num_mode=3),
        partial(tiny_flux_controlnet, pixels=True),
        UNTOLD_FLUX,
        partial(tiny_sd3_controlnet, force_zeros=False),
        partial(tiny_sd3_controlnet, without_text=True),
    ],
    ids=["flux_union", "flux_pixels", "flux_schnell", "sd3_shifted", "sd35_large"],
)
def test_parity_of_other_controlnets(build) -> None:
    rows = check_family(build())
    assert {name: value for name, value in rows if not value < LIMIT} == {}


@pytest.mark.parametrize("name", BASES)
def test_the_base_s_settings_suit_it(name, tmp_path_factory) -> None:
    source = ModelSource(str(teacher_dir(name, tmp_path_factory)))
    assert ModelAtHand.of(source).family == name.partition("_")[0]
    assert ModelAtHand.planned("sdxl_controlnet").family == "sdxl"


@pytest.mark.full
def test_beside_a_single_file_it_is_the_folder_s(tmp_path, tmp_path_factory) -> None:
    folder = teacher_dir("sd_controlnet", tmp_path_factory)
    pipe = load_family(folder).pipeline
    state = {**denoiser_state(pipe.unet), **vae_state(pipe.vae), **clip_state(pipe.text_encoder)}
    save_file(state, tmp_path / "model.safetensors")
    source = ModelSource.of(tmp_path / "model.safetensors", single_file_config=str(folder))
    made = load_family(source).pipeline
    for part in ("unet", "controlnet"):
        states = [fingerprint(getattr(one, part).state_dict()) for one in (made, pipe)]
        assert states[0] == states[1], part


# ------------------------------------------------------------------------------- wrong pipelines
def changed(source, folder, part: str = "controlnet", **values):
    """A copy of a teacher's folder whose part is described otherwise."""
    shutil.copytree(source, folder)
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return folder


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sd_controlnet", {"conditioning_channels": 22}, "expected a ControlNet of pictures"),
        ("sd_controlnet", {"global_pool_conditions": True}, "both passes of guidance"),
        ("sd_controlnet", {"cross_attention_dim": 32}, "with cross_attention_dim 16, got 32"),
        ("sd_controlnet", {"block_out_channels": [8, 8]}, r"block_out_channels \[8, 16\], got"),
        (
            "sd_controlnet",
            {"conditioning_embedding_out_channels": [4, 8, 8]},
            "of 2 levels, as the vae has, got 3",
        ),
        ("flux_controlnet", {"num_attention_heads": 4}, "with num_attention_heads 2, got 4"),
        ("flux_controlnet", {"num_mode": 3}, "control_mode of a union.* from 0 to 2 .*got None"),
        ("flux_controlnet", {"num_mode": 3, "control_mode": 3}, "from 0 to 2 .*, got 3"),
        ("sd3_controlnet", {"extra_conditioning_channels": 1}, "latents alone, got extra"),
    ],
)
def test_a_controlnet_that_does_not_fit_is_refused_before_loading(
    name, values, message, tmp_path, tmp_path_factory, no_loading
) -> None:
    folder = changed(teacher_dir(name, tmp_path_factory), tmp_path / "model", **values)
    for refuse in (teacher_facts, load_family):
        with pytest.raises(ValueError, match=message) as raised:
            refuse(folder)
        assert "\n" not in str(raised.value)


def test_several_controlnets_are_refused(tmp_path, tmp_path_factory, no_loading) -> None:
    message = "expected controlnet to be one ControlNetModel, got MultiControlNetModel"
    folder = tmp_path / "model"
    shutil.copytree(teacher_dir("sd_controlnet", tmp_path_factory), folder)
    file = folder / "model_index.json"
    several = {"controlnet": ["diffusers", "MultiControlNetModel"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **several}))
    with pytest.raises(ValueError, match=message):
        teacher_facts(folder)
    pipeline = TINY["sd_controlnet"]()
    nets = MultiControlNetModel([pipeline.controlnet, pipeline.controlnet])
    pipeline.register_modules(controlnet=nets)
    with pytest.raises(ValueError, match=message):
        StableDiffusionControlNetFamily(pipeline)


def test_items_without_a_control_image_are_refused_before_loading(
    tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir("sd_controlnet", tmp_path_factory)
    with pytest.raises(ValueError, match="expected items with a control, columns conditioning_fi"):
        build_trainer("dmd2", teacher, "lora", tmp_path, dataset=["a prompt"])
    data = TinyData((4, 8, 8), "prompt", ("x0",), CONDITIONING)
    data.items[0][CONDITIONING] = torch.zeros(1, 16, 16)
    with pytest.raises(ValueError, match=r"expected images .* got \(1, 16, 16\)"):
        build_trainer("dmd2", teacher, "lora", tmp_path, dataset=data)


# --------------------------------------------------------------------------------------- training
@pytest.mark.full
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_a_trained_student_uses_its_control_image(name, layout, tmp_path, tmp_path_factory) -> None:
    """In memory, from the exported pipeline, and from the LoRA in the stock pipeline; SiD
    differentiates the roles that the student's sample is handed to."""
    teacher = teacher_dir(name, tmp_path_factory)
    options = {"learning_rate": 3e-2, "gradient_checkpointing": True}
    trainer = build_trainer("sid", teacher, layout, tmp_path / "run", **options)
    family = trainer.family
    before = fingerprint(family.pipeline.controlnet.state_dict())
    trainer.train()
    assert fingerprint(family.pipeline.controlnet.state_dict()) == before
    stored = [*(tmp_path / "run").rglob("*.safetensors")]
    assert not any("controlnet" in file.as_posix() for file in stored)
    loaded = [load_family(trainer.export(tmp_path / "pipeline"))]
    if layout == "lora":
        loaded.append(load_family(teacher))
        out = trainer.export(tmp_path / "lora", format="lora", dtype="float32")
        loaded[1].pipeline.load_lora_weights(str(out))
        argument = "image" if name.startswith(("sd_", "sdxl")) else "control_image"
        assert f'{argument}=load_image("input.png")' in (out / "README.md").read_text()
    cond, student = with_control(family, ["a", "a"], pixels(2)), trainer.bank["student"]
    x_t = torch.randn(1, *family.sample_shape()).expand(2, -1, -1, -1)
    with torch.no_grad():
        ours = student(x_t, torch.full((2,), 0.7).double(), cond).raw
        base = answer(load_family(teacher), cond)
    assert float((ours[0] - ours[1]).abs().max()) > 1e-3
    saved = [answer(f, with_control(f, ["a", "a"], pixels(2))) for f in loaded]
    assert all(float((one - saved[0]).abs().max()) < 1e-5 for one in saved)
    assert float((saved[0][0] - saved[0][1]).abs().max()) > 1e-3
    assert float((saved[0] - base).abs().max()) > 1e-3


@pytest.mark.full
def test_an_export_of_another_size_is_that_of_the_sampler(tmp_path, tmp_path_factory) -> None:
    """Checked at export; by stock Diffusers alone with the options that the card tells."""
    teacher = teacher_dir("sd_controlnet", tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run", resolution=32)
    trainer.train()
    pipe = DiffusionPipeline.from_pretrained(trainer.export(tmp_path / "out"))
    assert type(pipe) is StableDiffusionControlNetPipeline
    assert type(pipe.controlnet) is ControlNetModel
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert set(record["typed"]) == {"num_inference_steps", "height", "width"}


@pytest.mark.full
def test_a_union_s_export_tells_the_kind_of_its_image(tmp_path) -> None:
    """Checked at export; the guidance is folded into both networks."""
    tiny_flux_controlnet(num_mode=3).save_pretrained(tmp_path / "teacher")
    trainer = build_trainer("dmd2", tmp_path / "teacher", "full", tmp_path / "run")
    trainer.train()
    out = trainer.export(tmp_path / "out")
    record = json.loads((out / "distillation.json").read_text())
    assert record["typed"] == {"num_inference_steps": 2, "control_mode": 2}
    family = load_family(out)
    assert not family.config.guidance_embeds
    assert not family.pipeline.controlnet.config.guidance_embeds
    assert family.length_call == {"control_mode": 2}
