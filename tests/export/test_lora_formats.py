"""LoRA files for other tools: read back by Diffusers where it can, and by the exact inverse."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_ldm_unet_checkpoint,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_wan_transformer_to_diffusers,
)
from peft import PeftModel
from safetensors.torch import load_file
from support.original import denoiser_state
from support.runs import build_trainer, teacher_dir

from stepdistill.export.lora import export_lora, lora_rows
from stepdistill.export.lora_formats import (
    PREFIX,
    Lora,
    _rows,
    check_lora,
    folded,
    read_format,
    tensors_of,
)
from stepdistill.export.pipeline import RECORD
from stepdistill.families.registry import load_family
from stepdistill.loading.original_layout import join, original_layout, split
from stepdistill.testing.parity import LIMIT, as_family
from stepdistill.testing.tiny import TINY

FACTS = {"model": "base", "method": "dmd2", "step": 1, "seed": 0}
BY_DIFFUSERS = [("sd_v", "kohya"), ("sdxl", "kohya"), ("z_image", "kohya"), ("z_image", "comfyui")]
BY_DIFFUSERS += [(f, "kohya") for f in ("sd_upscale", "instruct_pix2pix", "sdxl_inpaint")]
BY_INVERSE = [
    *(("sd_v", "comfyui"), ("sdxl", "comfyui")),
    *(
        (family, form)
        for family in ("sd3", "flux", "flux_fill", "lumina2")
        for form in ("kohya", "comfyui")
    ),
]


def student(family, tmp_path, tmp_path_factory, alpha=7.0, **options):
    """A trainer whose rank-2 student has both factors moved off their start."""
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run", alpha=alpha, **options)
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        param.data = 0.15 * torch.randn(param.shape, generator=generator)
    return trainer


def export(trainer, out, form):
    return export_lora(
        trainer.family,
        trainer.bank,
        trainer.method.sampler(),
        out,
        FACTS,
        "student",
        form,
        "float32",
    )


def outputs(trainer, net):
    """The denoiser's answer at two times, and the student's."""
    family = trainer.family
    x = torch.randn(2, *family.sample_shape(), generator=torch.Generator().manual_seed(0))
    cond, times = family.encode(["a", "b"]), torch.tensor([999.0, 500.0])
    w = torch.zeros(2) if family.embeds_guidance else None
    with torch.no_grad(), trainer.bank.use("student"):
        ours = family.forward(family.net, x, times, cond, w=w)
    with torch.no_grad():
        return family.forward(net, x, times, cond, w=w), ours


def assert_the_student(trainer, net) -> None:
    theirs, ours = outputs(trainer, net)
    assert float((theirs - ours).abs().max()) < 1e-5 * max(1.0, float(ours.abs().max()))
    with torch.no_grad(), trainer.bank.use(None):
        plain, _ = outputs(trainer, trainer.family.net)
    assert float((plain - ours).abs().max()) > 1e-2


@pytest.mark.sampled("z_image-comfyui")
@pytest.mark.parametrize(("family", "form"), BY_DIFFUSERS)
def test_stock_loader_makes_the_student_of_it(family, form, tmp_path, tmp_path_factory) -> None:
    trainer = student(family, tmp_path, tmp_path_factory)
    out = export(trainer, tmp_path / "mine", form)
    read = json.loads((out / RECORD).read_text())["lora"]["read_back"]
    assert set(read) == {"inverse", "diffusers"}
    plain = load_family(trainer.teacher)
    plain.pipeline.load_lora_weights(str(out), weight_name="mine.safetensors")
    assert_the_student(trainer, plain.net)


@pytest.mark.full
@pytest.mark.parametrize(("family", "form"), BY_INVERSE)
def test_the_inverse_makes_the_student_of_it(family, form, tmp_path, tmp_path_factory) -> None:
    trainer = student(family, tmp_path, tmp_path_factory)
    out = export(trainer, tmp_path / "mine", form)
    plain = load_family(trainer.teacher)
    for name, delta in read_format(out / "mine.safetensors", plain.net, form).items():
        plain.net.get_submodule(name).weight.data += delta
    assert_the_student(trainer, plain.net)


def test_kohya_s_alpha_is_the_rank_and_fused_matrices_hold_three(
    tmp_path, tmp_path_factory
) -> None:
    trainer = student("flux", tmp_path, tmp_path_factory)
    tensors = load_file(export(trainer, tmp_path / "mine", "kohya") / "mine.safetensors")
    assert all(name.startswith("lora_unet_") for name in tensors)
    fused = "lora_unet_double_blocks_0_img_attn_qkv"
    assert float(tensors[f"{fused}.alpha"]) == 6.0
    assert tensors[f"{fused}.lora_down.weight"].shape[0] == 6
    assert float(tensors["lora_unet_double_blocks_0_img_attn_proj.alpha"]) == 2.0


@pytest.mark.full
def test_sdxl_kohya_keys_are_the_authors_and_sd_s_are_diffusers(tmp_path, tmp_path_factory) -> None:
    names = {}
    for family in ("sd_v", "sdxl"):
        trainer = student(family, tmp_path / family, tmp_path_factory)
        out = export(trainer, tmp_path / family / "mine", "kohya")
        names[family] = set(load_file(out / "mine.safetensors"))
    attention = "transformer_blocks_0_attn1_to_q.alpha"
    assert f"lora_unet_down_blocks_1_attentions_0_{attention}" in names["sd_v"]
    assert f"lora_unet_input_blocks_3_1_{attention}" in names["sdxl"]


@pytest.mark.full
def test_a_file_that_lost_its_strength_is_refused(tmp_path, tmp_path_factory) -> None:
    trainer = student("sd_v", tmp_path, tmp_path_factory)
    path = export(trainer, tmp_path / "mine", "comfyui") / "mine.safetensors"
    from stepdistill.export.lora_formats import adapters_of

    adapters = adapters_of(trainer.family.net, "student")
    name = next(iter(adapters))
    adapters[name] = Lora(adapters[name].down, adapters[name].up, 2.0)
    with pytest.raises(RuntimeError, match="relative differences"):
        check_lora(trainer.family, path, "comfyui", adapters)


@pytest.mark.parametrize("family", ["pixart", "dit", "sana"])
def test_networks_without_names_elsewhere_say_what_is_possible(
    family, tmp_path, tmp_path_factory
) -> None:
    trainer = student(family, tmp_path, tmp_path_factory)
    with pytest.raises(ValueError, match="expected format pipeline or lora"):
        trainer.export(tmp_path / "out", format="kohya")
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_an_unknown_format_is_refused(tmp_path, tmp_path_factory) -> None:
    trainer = student("sd_v", tmp_path, tmp_path_factory)
    with pytest.raises(ValueError, match="got 'a1111'"):
        trainer.export(tmp_path / "out", format="a1111")


@pytest.mark.full
def test_diffusers_is_another_name_of_lora(tmp_path, tmp_path_factory) -> None:
    trainer = student("sd_v", tmp_path, tmp_path_factory)
    out = trainer.export(tmp_path / "out", format="diffusers")
    assert json.loads((out / RECORD).read_text())["lora"]["format"] == "lora"


# ------------------------------------------- tables against Diffusers' converters
def assert_converted(theirs: dict, ours: dict) -> None:
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_unet_layout_of_sd15_s_shape() -> None:
    """Four levels of two blocks, the lowest without attention: an upsampler comes second there."""
    net = UNet2DConditionModel(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        cross_attention_dim=4,
        attention_head_dim=2,
    )
    config = dict(net.config)
    ours = convert_ldm_unet_checkpoint(denoiser_state(net), config)
    assert_converted(ours, dict(net.state_dict()))


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_layouts_of_tiny_networks(family, tmp_path_factory) -> None:
    net = load_family(teacher_dir(family, tmp_path_factory)).net
    state = denoiser_state(net)
    ours = (
        convert_ldm_unet_checkpoint(state, dict(net.config))
        if family == "sdxl"
        else convert_sd3_transformer_checkpoint_to_diffusers(state)
    )
    assert_converted(ours, dict(net.state_dict()))


def columns(net, width: int = 1) -> dict[str, torch.Tensor]:
    """Random (rows, width) in place of each weight: converters only look at rows."""
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.weight": torch.randn(count, width, generator=generator)
        for name, count in _rows(net).items()
    }


def test_flux_layout_at_the_released_width() -> None:
    with init_empty_weights():
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    ours = {
        name: value for name, value in columns(net).items() if "norm_" not in name or "out" in name
    }
    state = {}
    for place in original_layout(net):
        rows = {part: ours[f"{part}.weight"] for part in place.parts}
        state[f"{place.name}.weight"] = join(place, rows)
        state[f"{place.name}.bias"] = state[f"{place.name}.weight"][:, 0]
    for block in ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0"):
        for norm in ("query", "key"):
            state[f"{block}.norm.{norm}_norm.scale"] = torch.zeros(1)
    theirs = convert_flux_transformer_checkpoint_to_diffusers(state)
    assert set(ours) <= set(theirs)
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_wan_layout() -> None:
    net = tiny_wan()
    state = {}
    for place in original_layout(net):
        state[f"{place.name}.weight"] = columns(net)[f"{place.parts[0]}.weight"]
    theirs = convert_wan_transformer_to_diffusers(dict(state))
    ours = columns(net)
    for place in original_layout(net):
        name = f"{place.parts[0]}.weight"
        assert torch.equal(theirs[name], ours[name])


def test_split_undoes_join() -> None:
    with init_empty_weights():
        net = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    ours, rows = columns(net), _rows(net)
    for place in original_layout(net):
        tensors = {part: ours[f"{part}.weight"] for part in place.parts}
        again = split(place, join(place, tensors), rows)
        assert all(torch.equal(again[part], tensors[part]) for part in place.parts)


# ------------------------------------------------- Diffusers' LoRA converters alone
def tiny_wan() -> Any:
    return WanTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
    )


def tiny_qwen() -> Any:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


def wide_flux() -> Any:
    with init_empty_weights():
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVERTERS = {
    "flux": (wide_flux, FluxPipeline, (*ATTENTION, "proj_mlp", "norm_out.linear", "proj_out")),
    "flux_attention": (wide_flux, FluxPipeline, ATTENTION),
    "wan": (tiny_wan, WanPipeline, (*ATTENTION, "ffn.net.0.proj", "ffn.net.2")),
    "qwen": (tiny_qwen, QwenImagePipeline, (*ATTENTION, "add_q_proj", "img_mlp.net.2", "img_in")),
}


@pytest.mark.parametrize("form", sorted(PREFIX))
@pytest.mark.parametrize("case", sorted(CONVERTERS))
@pytest.mark.parametrize("rank", [2, 4])
def test_stock_converters_of_lora_keys(case, form, rank) -> None:
    build, pipeline, targets = CONVERTERS[case]
    net, generator = build(), torch.Generator().manual_seed(0)
    adapters = {
        name: Lora(
            torch.randn(rank, 3, generator=generator),
            torch.randn(count, rank, generator=generator),
            7.0,
        )
        for name, count in _rows(net).items()
        if name.endswith(targets) and "single_transformer_blocks.0.proj_out" not in name
    }
    state = tensors_of(folded(adapters, torch.float32), net, form)
    found: Any = pipeline.lora_state_dict(state)
    found = found[0] if isinstance(found, tuple) else found
    for name, lora in adapters.items():
        keys = [
            key for key in found if key.removeprefix("transformer.").startswith(f"{name}.lora_")
        ]
        parts = {key.split(".lora_")[1][0]: found[key] for key in keys}
        torch.testing.assert_close(parts["B"] @ parts["A"], lora.delta(), rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------- fusing and stacking
@pytest.mark.full
@pytest.mark.parametrize("family", ["sd_v", "sd3"])
def test_fused_is_unfused(family, tmp_path, tmp_path_factory) -> None:
    trainer = student(family, tmp_path, tmp_path_factory)
    out = export(trainer, tmp_path / "mine", "lora")
    plain = load_family(trainer.teacher)
    plain.pipeline.load_lora_weights(str(out))
    plain.pipeline.fuse_lora()
    plain.pipeline.unload_lora_weights()
    assert_the_student(trainer, plain.net)


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd_v", "sd3"])
def test_a_style_stacks_at_its_weight(family, tmp_path, tmp_path_factory) -> None:
    """set_adapters([student, style], [1, 0.5]) adds both deltas to the base, scaled."""
    folders, deltas = [], []
    for name, alpha in (("student", 7.0), ("style", 1.0)):
        trainer = student(family, tmp_path / name, tmp_path_factory, alpha=alpha)
        folders.append(export(trainer, tmp_path / f"{name}-lora", "lora"))
        deltas.append(dict(adapters(trainer)))
    stacked, summed = load_family(trainer.teacher), load_family(trainer.teacher)
    for name, folder in zip(("student", "style"), folders, strict=True):
        stacked.pipeline.load_lora_weights(str(folder), adapter_name=name)
    stacked.pipeline.set_adapters(["student", "style"], [1.0, 0.5])
    for name in deltas[0]:
        weight = summed.net.get_submodule(name).weight
        weight.data += deltas[0][name].delta() + 0.5 * deltas[1][name].delta()
    theirs, ours = (outputs(trainer, family.net)[0] for family in (stacked, summed))
    assert float((theirs - ours).abs().max()) < 1e-5 * max(1.0, float(ours.abs().max()))


def adapters(trainer) -> dict[str, Lora]:
    from stepdistill.export.lora_formats import adapters_of

    return adapters_of(trainer.family.net, "student")


@pytest.mark.full
def test_peft_reads_what_diffusers_has_no_loader_for(tmp_path, tmp_path_factory) -> None:
    trainer = student("pixart", tmp_path, tmp_path_factory)
    out = export(trainer, tmp_path / "mine", "lora")
    plain = load_family(trainer.teacher)
    assert_the_student(trainer, PeftModel.from_pretrained(plain.net, str(out)).merge_and_unload())


_ROWS_BY_DEFAULT = ("dit", "flux", "z_image")


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=() if f in _ROWS_BY_DEFAULT else pytest.mark.full) for f in TINY],
)
def test_the_check_reads_every_format_back(family) -> None:
    rows = lora_rows(as_family(TINY[family]()))
    assert any(name.startswith("lora: lora, read back by") for name, _ in rows)
    assert {name: value for name, value in rows if not value < LIMIT} == {}


def test_a_reader_without_metadata_loses_no_strength(monkeypatch) -> None:
    """It takes alpha for the rank, here 2 of a student of alpha 3."""
    family, save = as_family(TINY["flux"]()), type(TINY["flux"]()).save_lora_weights

    def plain(*args: Any, **told: Any) -> None:
        save(*args, **{k: v for k, v in told.items() if not k.endswith("metadata")})

    monkeypatch.setattr(type(family.pipeline), "save_lora_weights", plain)
    found = dict(lora_rows(family))
    assert found["lora: lora, read back by diffusers"] < LIMIT
