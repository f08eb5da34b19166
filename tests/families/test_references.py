"""Reference images as tokens beside x_t: Flux Kontext, Flux.2, Qwen-Image-Edit and Edit-Plus."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
from PIL import Image
from support.runs import TinyData, build_trainer, teacher_dir
from support.samples import png
from torch import Tensor

from stepdistill.config.files import parse_run_config
from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.types import CONDITIONING, Cond
from stepdistill.families.beside import stand_in
from stepdistill.families.flux_kontext import FluxKontextFamily
from stepdistill.families.qwen_image_edit import QwenImageEditFamily
from stepdistill.families.registry import load_family
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny import TINY
from stepdistill.testing.tiny_video import tiny_qwen_image_edit
from stepdistill.training.batches import BatchMaker
from stepdistill.training.checks import buckets_fit
from stepdistill.training.sources import open_dataset

READ = ("flux2", "flux_kontext", "qwen_image_edit", "qwen_image_edit_2511")


@pytest.fixture(params=[READ[0], READ[1], READ[2], pytest.param(READ[3], marks=pytest.mark.full)])
def editing(request, make_family):
    return make_family(request.param)


def pixels(*lead: int) -> Tensor:
    """Pictures of whole 8-bit levels (*lead, 3, 16, 16)."""
    levels = torch.randint(0, 256, (*lead, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1.0


def told(family, prompts, images: Tensor) -> Cond:
    return family.with_images(family.encode_text(prompts), {"image": images}, family.sample_shape())


def answer(family, cond: Cond, net: Any = None) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(1, *family.sample_shape(), generator=generator).expand(cond.bsz, -1, -1, -1)
    with torch.no_grad():
        return family.forward(net or family.net, x_t, torch.full((cond.bsz,), 700.0), cond)


# ------------------------------------------------------------------------------------- conditions
def test_another_reference_makes_another_output(editing) -> None:
    cond = told(editing, ["a", "a"], pixels(2))
    assert cond["references"].shape[:2] == (2, 1)
    one, two = answer(editing, cond)
    assert float((one - two).abs().max()) > 1e-3
    # A row's bits are its own, whatever stands beside it.
    alone = told(editing, ["a"], pixels(2)[1:])
    for name, value in alone.tensors.items():
        assert torch.equal(cond[name][1:], value), name


def test_the_null_keeps_the_images_and_drops_the_text(editing) -> None:
    cond = told(editing, ["a", "two cats"], pixels(2))
    null = editing.null_for(cond)
    assert set(null.tensors) == set(cond.tensors)
    assert torch.equal(null["references"], cond["references"])
    assert not torch.equal(null["prompt_embeds"], cond["prompt_embeds"])
    again = editing.null_for(told(editing, ["a dog", "none"], pixels(2)))
    for name in ("prompt_embeds", "length", "pooled"):
        if name in null.tensors:
            assert torch.equal(null[name], again[name]), name


def test_the_null_of_a_stock_call_reads_the_image_too(make_family) -> None:
    family = make_family("qwen_image_edit")
    null = family.null_for(told(family, ["a", "a"], pixels(2)))
    assert not torch.equal(null["prompt_embeds"][0], null["prompt_embeds"][1])


def test_batches_have_them_and_no_method_sees_them(editing) -> None:
    raw = {
        "index": [0, 1],
        "prompt": ["a", "b"],
        "image": pixels(2),
        CONDITIONING: pixels(2).flip(0),
    }
    batch = BatchMaker(editing, torch.device("cpu"))(raw)
    assert batch.has() == {"cond", "null", "prompts", "x0", "real"}
    expected = told(editing, ["a", "b"], raw[CONDITIONING])
    assert all(torch.equal(batch.cond[name], value) for name, value in expected.tensors.items())
    assert torch.equal(batch.null["references"], batch.cond["references"])


def test_a_pair_of_a_prompt_and_an_image_is_encoded_once(make_family, monkeypatch) -> None:
    family, calls = make_family("flux_kontext"), []
    make = family.with_images
    monkeypatch.setattr(family, "with_images", lambda *given: calls.append(1) or make(*given))
    raw = {"index": [0, 1, 2], "prompt": ["a", "b", "a"], CONDITIONING: pixels(2)[[0, 1, 0]]}
    maker = BatchMaker(family, torch.device("cpu"))
    batches = [maker(raw), maker({**raw, CONDITIONING: pixels(2)[[0, 0, 1]]})]
    assert len(calls) == 4  # (a, 0), (b, 1), (b, 0), (a, 1)
    plain = BatchMaker(family, torch.device("cpu"), cache_latents=False)
    again = [plain(raw), plain({**raw, CONDITIONING: pixels(2)[[0, 0, 1]]})]
    for one, two in zip(batches, again, strict=True):
        assert all(torch.equal(one.cond[name], value) for name, value in two.cond.tensors.items())


def test_flux2_trains_without_them_too(make_family) -> None:
    family = make_family("flux2")
    batch = BatchMaker(family, torch.device("cpu"))({"index": [0], "prompt": ["a"]})
    assert set(batch.cond.tensors) == {"prompt_embeds"}


@pytest.mark.parametrize("name", ["flux2", "qwen_image_edit_2511"])
def test_several_references_in_their_order(name, make_family) -> None:
    family = make_family(name)
    cond = told(family, ["a", "a"], torch.stack([pixels(2), pixels(2).flip(0)]))
    assert cond["references"].shape[:2] == (2, 2)
    one, two = answer(family, cond)
    assert float((one - two).abs().max()) > 1e-4


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({}, "expected items with an image, columns conditioning_file_name"),
        ({"image": torch.zeros(1, 4, 16, 16)}, r"got \(4, 16, 16\)"),
        ({"image": [torch.zeros(3, 16, 16)]}, "expected images .* got list"),
        ({"image": torch.zeros(1, 2, 3, 16, 16)}, "expected at most 1 image a row, got 2"),
    ],
)
def test_wrong_images_are_refused_in_a_line(images, message, make_family) -> None:
    family = make_family("flux_kontext")
    with pytest.raises(ValueError, match=message) as raised:
        family.with_images(family.encode_text(["a"]), images, family.sample_shape())
    assert "\n" not in str(raised.value)


def test_prompts_too_long_for_the_condition_are_refused(make_family) -> None:
    family = make_family("qwen_image_edit")
    with pytest.raises(ValueError, match=r"at most 4096 bytes, got one of 5000"):
        family.encode_text(["a" * 5000])
    with pytest.raises(ValueError, match=r"at most 512 tokens, got 600"):
        family.encode(["a" * 600])


@pytest.mark.parametrize("name", ["flux2", "flux_kontext", "qwen_image_edit"])
def test_features_are_the_tokens_of_x_t(name, make_family) -> None:
    family = make_family(name)
    family.reference = stand_in(16)
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    cond = family.encode(["a"])
    x_t, t = torch.randn(1, *family.sample_shape()), torch.tensor([0.7]).double()
    blocks = tuple(family.feature_blocks())
    with torch.no_grad():
        features = teacher(x_t, t, cond, features=blocks).features
    tokens = family.pack(x_t).shape[1]
    assert {value.shape[1] for value in features.values()} == {tokens}


# ----------------------------------------------------------------------------------------- parity
class Unplaced(FluxKontextFamily):
    def _positions(self, latents, dtype):
        return super()._positions(latents, dtype).roll(1, dims=1)


class References(FluxKontextFamily):
    def images_of(self, x_t, cond):
        return super().images_of(x_t, cond)[::-1]


class UntoldNull(QwenImageEditFamily):
    def null(self, bsz: int) -> Cond:
        return self.encode([""]).repeat(bsz)


@pytest.mark.full
@pytest.mark.parametrize(
    ("wrong", "name", "row"),
    [
        (Unplaced, "flux_kontext", "encode"),
        (References, "flux_kontext", "denoiser"),
        (UntoldNull, "qwen_image_edit", "sampling"),
    ],
)
def test_check_finds_a_wrong_adapter(wrong, name, row) -> None:
    found = [name for name, value in check_family(wrong(TINY[name]())) if not value < LIMIT]
    assert any(name.startswith(row) for name in found)


def test_2511_tells_its_references_another_time(make_family) -> None:
    """Of the class, the config and the list of shapes decide: nothing is to be told."""
    family = make_family("qwen_image_edit_2511")
    cond = family.encode(["a"])
    told_zero = answer(family, cond)
    family.net.zero_cond_t = False
    for block in family.net.transformer_blocks:
        block.zero_cond_t = False
    assert float((answer(family, cond) - told_zero).abs().max()) > 1e-4


@pytest.mark.every
@pytest.mark.parametrize("several", [False, True])
def test_parity_at_the_stock_calls_own_megapixel(several, monkeypatch) -> None:
    """By the stock rule of sizes; tiny models go elsewhere by a smaller one."""
    for module in (plus, QwenImageEditFamily(tiny_qwen_image_edit()).stock):
        monkeypatch.setattr(module, "calculate_dimensions", module.calculate_dimensions.args[0])
    family = QwenImageEditFamily(tiny_qwen_image_edit(plus=several, vae_levels=6))
    family.reference = stand_in(64).resize((96, 64))
    assert family.encode(["a"])["references"].shape[-2:] == (26, 38)  # even
    # At this size the last bit of the time, told in float32, is seen: the same in float64 networks.
    assert max(value for _, value in check_family(family)) < 2 * LIMIT


def test_two_references_stand_where_the_stock_call_puts_them(make_family) -> None:
    family = make_family("flux2")
    rows = [[stand_in(64), stand_in(64).transpose(Image.Transpose.ROTATE_90)]]
    cond = family._with(family.encode_text(["a"]), rows)
    captured: dict[str, Any] = {}
    family.net.register_forward_pre_hook(
        lambda _m, _a, kwargs: captured.update(kwargs), with_kwargs=True
    )
    answer(family, cond)
    ours = dict(captured)
    family.pipeline(
        prompt="a", height=16, width=16, image=rows[0], num_inference_steps=1, guidance_scale=1.0
    )
    assert torch.equal(ours["img_ids"], captured["img_ids"])
    tokens = ours["hidden_states"].shape[1] - 16
    assert torch.allclose(
        ours["hidden_states"][:, -tokens:], captured["hidden_states"][:, -tokens:], atol=1e-6
    )


# --------------------------------------------------------------------------------------- training
def test_items_without_a_reference_are_refused_before_loading(
    tmp_path, tmp_path_factory, no_loading
) -> None:
    teacher = teacher_dir("flux_kontext", tmp_path_factory)
    with pytest.raises(ValueError, match="expected items with an image, columns conditioning_file"):
        build_trainer("dmd2", teacher, "lora", tmp_path, dataset=["a prompt"])
    data = TinyData((4, 8, 8), "prompt", ("x0",), CONDITIONING)
    data.items[0][CONDITIONING] = torch.zeros(1, 16, 16)
    with pytest.raises(ValueError, match=r"expected images .* got \(1, 16, 16\)"):
        build_trainer("dmd2", teacher, "lora", tmp_path, dataset=data)


@pytest.mark.full
@pytest.mark.parametrize(
    "name", ["flux_kontext", pytest.param("qwen_image_edit", marks=pytest.mark.full)]
)
def test_a_trained_student_uses_its_reference(name, tmp_path, tmp_path_factory) -> None:
    """In memory, from the exported pipeline, and from the LoRA in the stock pipeline."""
    teacher = teacher_dir(name, tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run", learning_rate=3e-2)
    trainer.train()
    family = trainer.family
    exported = load_family(trainer.export(tmp_path / "pipeline"))
    with_lora = load_family(teacher)
    with_lora.pipeline.load_lora_weights(
        str(trainer.export(tmp_path / "lora", format="lora", dtype="float32"))
    )
    cond, student = told(family, ["a", "a"], pixels(2)), trainer.bank["student"]
    x_t = torch.randn(1, *family.sample_shape()).expand(2, -1, -1, -1)
    with torch.no_grad():
        ours = student(x_t, torch.full((2,), 0.7).double(), cond).raw
        base = answer(load_family(teacher), cond)
    assert float((ours[0] - ours[1]).abs().max()) > 1e-3
    saved = [answer(f, told(f, ["a", "a"], pixels(2))) for f in (exported, with_lora)]
    assert float((saved[0] - saved[1]).abs().max()) < 1e-5
    assert float((saved[0][0] - saved[0][1]).abs().max()) > 1e-3
    assert float((saved[0] - base).abs().max()) > 1e-3


def test_buckets_have_references_of_their_size(make_family) -> None:
    family = make_family("flux_kontext")
    size, wide = [(16, 24)] * 2, pixels(2)[..., :16].repeat(1, 1, 1, 2)[..., :24]
    raw = {"index": [0, 1], "prompt": ["a", "b"], CONDITIONING: wide, "size": size}
    batch = BatchMaker(family, torch.device("cpu"))(raw)
    assert batch.shape == (4, 8, 12)
    assert batch.cond["references"].shape == (2, 1, 4, 8, 12)
    stub = SimpleNamespace(family=type(family))
    buckets_fit(SimpleNamespace(by_ratio=True), None, stub)


@pytest.mark.full
def test_a_run_s_options_lead_to_them(tmp_path, tmp_path_factory) -> None:
    """From a folder without images to become, columns of a user's own names, to two updates."""
    teacher = teacher_dir("flux_kontext", tmp_path_factory)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").write_bytes(png(40))
    (folder / "metadata.jsonl").write_text('{"before": "a.png", "text": "redder"}')
    told = ["--pretrained_model_name_or_path", str(teacher), "--method", "dmd2"]
    told += ["--data.train_data_dir", str(folder)]
    run = parse_run_config([*told, "--data.conditioning_column", "before"])
    data = open_dataset(run)
    assert set(data[0]) == {"prompt", CONDITIONING}
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run", dataset=data)
    assert all(math.isfinite(value) for value in trainer.train().values())
    with pytest.raises(ValueError, match=r"jsonl:1: expected .* and conditioning_file_name, got"):
        open_dataset(parse_run_config(told))
