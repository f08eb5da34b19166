"""Workflows for ComfyUI and card code: valid by the nodes' data, with the student's numbers."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import pytest
from safetensors.torch import save_file
from support.original import denoiser_state
from support.runs import teacher_dir

from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.export.comfyui_nodes import NODES
from stepdistill.export.lora import export_lora
from stepdistill.export.pipeline import RECORD, export_pipeline
from stepdistill.families.registry import load_family
from stepdistill.loading.source import ModelSource
from stepdistill.testing.parity import adapted, as_family
from stepdistill.testing.tiny import TINY

FACTS = {"model": "my/base", "method": "dmd2", "step": 1, "seed": 0}
CASES = ("sd", "sd_v", "sdxl", "sd3", "flux", "lumina2", "z_image", "qwen_image", "wan", "wan_i2v")
CASES += ("flux_kontext", "qwen_image_edit", "qwen_image_edit_2511")
CHANNELS = ("instruct_pix2pix", "sd_inpaint", "sdxl_inpaint", "flux_fill")
CASES += CHANNELS
CASES += ("sd_controlnet", "sdxl_controlnet", "flux_controlnet", "sd3_controlnet")
OPTIONAL = {"start_image", "clip_vision_output", "image2", "image3"}
SOURCES = {"seed": "KSampler", "noise_seed": "SamplerCustom"}


@cache
def family_of(name: str) -> Any:
    return as_family(TINY[name]())


def export(name, out, spec=None, form="comfyui", facts=FACTS):
    family = family_of(name)
    spec = spec or SamplerSpec(uniform_grid(4, family.shift), "renoise")
    with adapted(family) as bank:
        return export_lora(family, bank, spec, out, facts, format=form)


def opened(folder) -> dict[str, Any]:
    return json.loads((folder / "workflow.json").read_text())


def check(graph) -> None:
    """Every class known, every link of one type at both ends, every input and widget there."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) == graph["last_node_id"]
    for node in graph["nodes"]:
        rule = NODES[node["type"]]
        assert {i["name"]: i["type"] for i in node["inputs"]} == rule.inputs
        assert tuple(o["type"] for o in node["outputs"]) == rule.outputs
        assert len(node["widgets_values"]) == len(rule.widgets), node["type"]
        for value, kind in zip(node["widgets_values"], rule.widgets.values(), strict=True):
            wanted = {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool}.get(kind, str)
            assert isinstance(value, wanted), (node["type"], value, kind)
        for entry in node["inputs"]:
            assert entry["link"] is not None or entry["name"] in OPTIONAL, entry
    for number, source, output, target, slot, kind in graph["links"]:
        assert source < target
        sent, taken = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        assert sent["type"] == taken["type"] == kind
        assert number in sent["links"]
        assert taken["link"] == number
    unused = [
        node["type"]
        for node in graph["nodes"]
        if NODES[node["type"]].outputs and not any(o["links"] for o in node["outputs"])
    ]
    assert unused == []


def widgets(graph, kind) -> list[Any]:
    (found,) = [node for node in graph["nodes"] if node["type"] == kind]
    return dict(zip(NODES[kind].widgets, found["widgets_values"], strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_family_s_workflow_fits_the_nodes(name, tmp_path) -> None:
    out = export(name, tmp_path / "student")
    graph, record = opened(out), json.loads((out / RECORD).read_text())
    check(graph)
    lora = widgets(graph, "LoraLoaderModelOnly")
    assert lora == {"lora_name": "student.safetensors", "strength_model": 1.0}
    kinds = {node["type"] for node in graph["nodes"]}
    if record["tools"]["comfyui"]["scheduler"] == "simple":
        sampler = widgets(graph, "KSampler")
        assert (sampler["steps"], sampler["cfg"], sampler["denoise"]) == (4, 1.0, 1.0)
        assert (sampler["sampler_name"], sampler["scheduler"]) == ("lcm", "simple")
    else:
        assert widgets(graph, "ManualSigmas")["sigmas"].count(",") == 4
    assert ("SaveAnimatedWEBP" in kinds) == name.startswith("wan")
    assert ("FluxGuidance" in kinds) == (name.startswith("flux"))
    edits = {"TextEncodeQwenImageEdit", "TextEncodeQwenImageEditPlus", "ReferenceLatent"} & kinds
    assert len(edits) == ("kontext" in name or "edit" in name)
    beside = {"InstructPixToPixConditioning", "InpaintModelConditioning"} & kinds
    assert len(beside) == (name in CHANNELS)
    assert ("LoadImageMask" in kinds) == ("InpaintModelConditioning" in kinds)
    assert "workflow.json" in (out / "README.md").read_text()


def test_the_upscaler_s_noise_table_is_not_theirs(tmp_path) -> None:
    out = export("sd_upscale", tmp_path / "out")
    assert not (out / "workflow.json").exists()
    assert "have one noise table" in (out / "README.md").read_text()


def test_times_off_the_schedule_stand_in_a_custom_sampler(tmp_path) -> None:
    graph = opened(export("sd3", tmp_path / "out", SamplerSpec((0.9, 0.5), "ode")))
    check(graph)
    assert widgets(graph, "ManualSigmas")["sigmas"] == "0.9, 0.5, 0"
    assert widgets(graph, "KSamplerSelect") == {"sampler_name": "euler"}


def test_flux_is_told_its_guidance_by_a_node(tmp_path) -> None:
    spec = SamplerSpec(uniform_grid(4), "renoise", w=2.0)
    out = export("flux", tmp_path / "out", spec)
    graph, card = opened(out), (out / "README.md").read_text()
    assert widgets(graph, "FluxGuidance") == {"guidance": 3.0}
    assert widgets(graph, "KSampler")["cfg"] == 1.0
    assert "`FluxGuidance` stands behind the prompt: set it to 3. That is not cfg" in card
    assert widgets(graph, "ModelSamplingFlux")["max_shift"] == 0.0


def test_velocity_prediction_is_told_by_a_node(tmp_path) -> None:
    """The tiny teacher's checkpoint says nothing of it."""
    graph = opened(export("sd_v", tmp_path / "out"))
    assert widgets(graph, "ModelSamplingDiscrete") == {"sampling": "v_prediction", "zsnr": False}


@pytest.mark.sampled(
    "flux-lora-is read whole by ComfyUI (`models/loras`)",
    "wan-lora-`--format kohya` (A1111, ComfyUI, sd-scripts) or `--format comfyui`",
    "sd-kohya-ComfyUI (`models/loras`), A1111 (`models/Lora`), sd-scripts",
)
@pytest.mark.parametrize(
    ("name", "form", "said"),
    [
        ("sd", "lora", "Diffusers reads `pytorch_lora_weights.safetensors`; other tools do not."),
        ("sd", "kohya", "ComfyUI (`models/loras`), A1111 (`models/Lora`), sd-scripts"),
        ("flux", "lora", "is read whole by ComfyUI (`models/loras`)"),
        ("wan", "lora", "`--format kohya` (A1111, ComfyUI, sd-scripts) or `--format comfyui`"),
    ],
)
def test_the_card_says_which_file_goes_where(name, form, said, tmp_path) -> None:
    out = export(name, tmp_path / "student", form=form)
    assert said in (out / "README.md").read_text()
    assert (out / "workflow.json").exists() == ("read whole" in said or form == "kohya")


def test_a_pipeline_s_card_has_the_numbers_too(tmp_path) -> None:
    family = family_of("sd3")
    with adapted(family) as bank:
        spec = SamplerSpec(uniform_grid(4, family.shift), "renoise")
        out = export_pipeline(family, bank, spec, tmp_path / "out", FACTS, verify=False)
    card = (out / "README.md").read_text()
    assert "- ComfyUI: sampler `lcm`, scheduler `simple`, steps 4, cfg 1, shift" in card
    assert "`ManualSigmas`: `1, " in card


@pytest.mark.full
def test_card_code_of_a_file_with_the_denoiser_alone_runs(
    tmp_path, tmp_path_factory, monkeypatch
) -> None:
    folder = teacher_dir("sd3", tmp_path_factory)
    path = tmp_path / "transformer.safetensors"
    save_file(denoiser_state(load_family(folder).net), path)
    source = ModelSource.of(path, single_file_config=str(folder))
    family = load_family(source)
    with adapted(family) as bank:
        facts = {**FACTS, **source.facts()}
        spec = SamplerSpec((1.0, 0.5), "renoise")
        out = export_lora(family, bank, spec, tmp_path / "mine", facts)
    (code,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert "transformer=SD3Transformer2DModel.from_single_file(" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), {})
    assert (tmp_path / "image.png").is_file()
