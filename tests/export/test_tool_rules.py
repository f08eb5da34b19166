"""LoRA files read by the rules of ComfyUI, A1111 and sd-scripts."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import ZImageTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from support.tools import (
    FAMILIES,
    a1111_split,
    a1111_version,
    comfyui_reads,
    native_places,
    sd_scripts_scales,
)

from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.export.adapter_files import read_adapters
from stepdistill.export.lora import export_lora
from stepdistill.export.lora_formats import Lora, adapters_of, read_with_diffusers, tensors_of
from stepdistill.export.merge_adapters import merge_adapters
from stepdistill.export.pipeline import RECORD
from stepdistill.export.tool_rules import readers, tool_rules
from stepdistill.testing.parity import adapted, as_family
from stepdistill.testing.tiny import TINY

FACTS = {"model": "base", "method": "dmd2", "step": 1, "seed": 0}
FORMATS = ("lora", "kohya", "comfyui")
WEIGHTS = {"lora": "pytorch_lora_weights.safetensors"}


@cache
def family_of(name: str) -> Any:
    return as_family(TINY[name]())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, weight file, adapters, places of the tools' modules) by family and format."""
    made = {}

    def make(name: str, form: str, dtype: str = "float32") -> SimpleNamespace:
        if (name, form, dtype) not in made:
            family, out = family_of(name), tmp_path_factory.mktemp("tools") / "student"
            spec = SamplerSpec(uniform_grid(4, family.shift), "renoise")
            with adapted(family) as bank:
                export_lora(family, bank, spec, out, FACTS, format=form, dtype=dtype)
                adapters = adapters_of(bank.base_of("student"), "student")
                places = native_places(name, family.net)
            file = out / WEIGHTS.get(form, "student.safetensors")
            made[name, form, dtype] = SimpleNamespace(
                out=out, file=file, adapters=adapters, places=places
            )
        return made[name, form, dtype]

    return make


def expected(made) -> dict[str, torch.Tensor]:
    """What the adapters add to the tools' modules."""
    deltas = {}
    for name, parts in made.places.items():
        there = {part: made.adapters[part].delta() for part, _ in parts if part in made.adapters}
        if there:
            columns = next(iter(there.values())).shape[1:]
            rows = [there.get(part, torch.zeros(count, *columns)) for part, count in parts]
            deltas[name] = torch.cat(rows)
    return deltas


def worst(read, wanted) -> float:
    assert read.keys() == wanted.keys()
    return max(float((read[n] - x).abs().max() / x.abs().max()) for n, x in wanted.items())


@pytest.mark.sampled("sd_v-comfyui", "sd3-lora", "flux-comfyui", "lumina2-kohya", "wan-comfyui")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", FAMILIES)
def test_comfyui_reads_what_the_rules_say(name, form, exported) -> None:
    """All keys and the whole delta, or keys left unused where its names are others."""
    made, family = exported(name, form), family_of(name)
    read, unused = comfyui_reads(load_file(made.file), name, made.places)
    told = json.loads((made.out / RECORD).read_text())["lora"]["readers"]
    assert told == readers(tool_rules(family.net), form)
    unused = {key for key in unused if not key.endswith(".lora.alpha")}  # a log line, no weight
    if "ComfyUI" not in told:
        assert unused
        return
    assert unused == set()
    assert worst(read, expected(made)) < 1e-6


def test_which_default_files_comfyui_does_not_read() -> None:
    unread = {name for name in FAMILIES if "ComfyUI" not in readers(rules_of(name), "lora")}
    assert unread == {"sd_v", "sdxl", "lumina2", "wan"}


def rules_of(name):
    return tool_rules(family_of(name).net)


def test_z_image_kohya_is_fused_at_the_released_layout() -> None:
    """34 blocks of attention_qkv, attention_out and three of the feed-forward."""
    with init_empty_weights():
        net = ZImageTransformer2DModel(
            n_layers=30, dim=8, n_heads=2, n_kv_heads=2, axes_dims=[2, 1, 1]
        )
    targets = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    adapters = {
        name: Lora(torch.ones(1, 1), torch.ones(module.out_features, 1), 1.0)
        for name, module in net.named_modules()
        if name.endswith(targets)
    }
    assert len(adapters) == 34 * 7
    keys = tensors_of(adapters, net, "kohya")
    assert len(keys) == 34 * 5 * 3
    assert keys["lora_unet_layers_29_attention_qkv.lora_up.weight"].shape == (24, 3)
    assert keys["lora_unet_context_refiner_1_attention_out.lora_down.weight"].shape == (1, 1)
    assert not any("_to_" in key for key in keys)


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd_v", "sdxl", "sd3"])
def test_a1111_splits_every_key(name, exported) -> None:
    for key in load_file(exported(name, "kohya").file):
        module, part = a1111_split(key, sd3=name == "sd3")
        assert module.startswith("lora_unet_")
        assert "." not in module
        known = {"lora_up.weight", "lora_down.weight", "lora.alpha" if name == "sd3" else "alpha"}
        assert part in known


def test_a1111_fails_on_the_usual_alpha_of_sd3() -> None:
    with pytest.raises(ValueError, match="not enough values"):
        a1111_split("lora_unet_joint_blocks_0_x_block_attn_qkv.alpha", sd3=True)


@pytest.mark.full
@pytest.mark.parametrize(("name", "version"), [("sd_v", "SD1"), ("sdxl", "SDXL")])
def test_a1111_shows_a_file_with_its_model(name, version, exported) -> None:
    with safe_open(exported(name, "kohya").file, "pt") as file:
        assert a1111_version(file.metadata()) == version


def test_a1111_takes_a_text_width_of_1024_for_sd2() -> None:
    config = SimpleNamespace(addition_embed_type=None, cross_attention_dim=1024)
    net = type("UNet2DConditionModel", (), {"config": config})()
    rules = tool_rules(net)
    assert a1111_version(rules.metadata) == "SD2"
    assert rules.architecture == "stable-diffusion-v2-512"


@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2"])
def test_sd_scripts_finds_every_alpha(name, exported) -> None:
    scales = sd_scripts_scales(load_file(exported(name, "kohya").file))
    assert set(scales.values()) == {1.0}


@pytest.mark.parametrize(
    ("name", "architecture", "version"),
    [
        ("sd_v", "stable-diffusion-v1/lora", "sd_v1"),
        ("sdxl", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
        ("sd3", "stable-diffusion-3-medium/lora", "medium"),
        ("flux", "flux-1-dev/lora", "flux1"),
        ("z_image", "Z-Image/lora", None),
    ],
)
def test_headers(name, architecture, version, exported) -> None:
    with safe_open(exported(name, "kohya").file, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == architecture
    assert metadata.get("ss_base_model_version") == version
    assert metadata["ss_network_alpha"] == metadata["ss_network_dim"] == "2"
    assert metadata["modelspec.sai_model_spec"] == "1.0.1"
    assert "4 steps, sampler lcm" in metadata["modelspec.usage_hint"]


# --------------------------------------------------------------- Diffusers' own
@pytest.mark.full
@pytest.mark.parametrize("name", ["sd_v", "sd3", "flux"])
def test_alpha_is_the_rank_and_diffusers_reads_the_same(name, exported) -> None:
    made = exported(name, "lora")
    with safe_open(made.file, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    alphas = {value for key, value in told.items() if key.endswith(".lora_alpha")}
    assert alphas == {value for key, value in told.items() if key.endswith(".r")} == {2}
    read = read_with_diffusers(family_of(name), made.file)
    assert worst(read, {n: lora.delta() for n, lora in made.adapters.items()}) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("form", FORMATS)
def test_bfloat16_is_the_default_and_half_the_size(form, exported, tmp_path) -> None:
    wide, half = exported("sd_v", form), exported("sd_v", form, "bfloat16")
    tensors = load_file(half.file)
    types = {value.dtype for key, value in tensors.items() if not key.endswith("alpha")}
    assert types == {torch.bfloat16}
    assert half.file.stat().st_size < 0.8 * wide.file.stat().st_size
    rounded = read_adapters(half.file).adapters
    exact = read_adapters(wide.file).adapters
    for stem, lora in exact.items():
        error = (rounded[stem].delta() - lora.delta()).norm() / lora.delta().norm()
        assert 0.0 < float(error) < 0.01
    family = family_of("sd_v")
    with adapted(family) as bank:
        out = export_lora(family, bank, SamplerSpec((1.0,), "ode"), tmp_path / "o", FACTS)
    assert json.loads((out / RECORD).read_text())["lora"]["dtype"] == "bfloat16"


def test_an_unknown_dtype_is_refused(tmp_path) -> None:
    family = family_of("sd_v")
    with adapted(family) as bank, pytest.raises(ValueError, match="expected a dtype of"):
        export_lora(family, bank, SamplerSpec((1.0,), "ode"), tmp_path / "o", FACTS, dtype="int8")
    assert not (tmp_path / "o").exists()


@pytest.mark.full
def test_files_of_earlier_exports_are_read_at_their_alpha(tmp_path) -> None:
    """Their metadata gives alpha 3 at rank 2."""
    family = family_of("sd_v")
    with adapted(family) as bank:
        net: Any = bank.base_of("student")
        adapters = adapters_of(net, "student")
        told = net.peft_config["student"].to_dict()
    state = {}
    for name, lora in adapters.items():
        state |= {f"{name}.lora_A.weight": lora.down, f"{name}.lora_B.weight": lora.up}
    layers = {"unet_lora_layers": state, "unet_lora_adapter_metadata": told}
    type(family.pipeline).save_lora_weights(tmp_path, safe_serialization=True, **layers)
    file = tmp_path / WEIGHTS["lora"]
    wanted = {name: lora.delta() for name, lora in adapters.items()}
    assert worst(read_with_diffusers(family, file), wanted) < 1e-6
    read = {
        stem.removeprefix("unet."): x.delta() for stem, x in read_adapters(file).adapters.items()
    }
    assert worst(read, wanted) < 1e-6


def test_a_merge_of_sd3_files_keeps_keys_that_a1111_splits(exported, tmp_path) -> None:
    made = exported("sd3", "kohya")
    out = merge_adapters([str(made.out), f"{made.out}:0.5"], tmp_path / "merged")
    tensors = load_file(out / "merged.safetensors")
    assert {a1111_split(key, sd3=True)[1] for key in tensors} >= {"lora.alpha"}
    read, _ = comfyui_reads(tensors, "sd3", made.places)
    assert worst(read, {n: 1.5 * x for n, x in expected(made).items()}) < 1e-6
