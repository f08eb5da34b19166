"""Teachers with LoRAs merged in: base plus scaled deltas, part of the run, or refused."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support.loras import style_lora
from support.runs import teacher_dir

from stepdistill import TrainConfig, Tuning
from stepdistill.data.stream import PromptDataset
from stepdistill.families.registry import load_family
from stepdistill.loading.source import ModelSource
from stepdistill.loading.teacher_lora import parse_lora
from stepdistill.trainers import VariationalScoreTrainer, trainer_of_run


@pytest.mark.sampled("flux", "sd3")
@pytest.mark.parametrize("family", ["sd_v", "sdxl", "sd3", "flux"])
def test_the_teacher_is_base_plus_scaled_deltas(family, tmp_path, tmp_path_factory) -> None:
    folder = teacher_dir(family, tmp_path_factory)
    first = style_lora(folder, tmp_path / "a", 0)
    second = style_lora(folder, tmp_path / "b", 1, rank=3, alpha=1)
    file = tmp_path / "b" / "pytorch_lora_weights.safetensors"
    merged = load_family(
        ModelSource.of(folder, teacher_lora=[f"{tmp_path / 'a'}:0.5", f"{file}:-2"])
    )
    base, ours = load_family(folder).net.state_dict(), merged.net.state_dict()
    assert base.keys() == ours.keys()
    for name, value in base.items():
        module = name.removesuffix(".weight")
        if module in first:
            value = value + 0.5 * first[module] - 2 * second[module]
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5)


def test_a_peft_folder_serves_pipelines_without_a_loader(tmp_path, tmp_path_factory) -> None:
    folder = teacher_dir("pixart", tmp_path_factory)
    adapted = get_peft_model(
        load_family(folder).net, LoraConfig(r=2, lora_alpha=7, target_modules=["to_q"])
    )
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            param.data.fill_(0.1)
    adapted.save_pretrained(tmp_path / "peft")
    ours = load_family(
        ModelSource.of(folder, teacher_lora=[f"{tmp_path / 'peft'}:0.5"])
    ).net.state_dict()
    base = load_family(folder).net.state_dict()
    name = "transformer_blocks.0.attn1.to_q"
    layer = adapted.base_model.model.get_submodule(name)
    expected = base[f"{name}.weight"] + 0.5 * layer.get_delta_weight("default")
    torch.testing.assert_close(ours[f"{name}.weight"], expected, rtol=0, atol=1e-6)
    assert ours.keys() == base.keys()


@pytest.mark.parametrize(
    ("text", "place", "name", "scale"),
    [
        ("me/style", "me/style", "pytorch_lora_weights.safetensors", 1.0),
        ("me/style:0.8", "me/style", "pytorch_lora_weights.safetensors", 0.8),
        ("me/style/sub/x.safetensors:-1e-1", "me/style", "sub/x.safetensors", -0.1),
    ],
)
def test_hub_ids(text, place, name, scale) -> None:
    lora = parse_lora(text)
    assert (lora.place, lora.weight_name, lora.scale) == (place, name, scale)
    assert math.copysign(1, lora.scale) == math.copysign(1, scale)


def test_a_path_may_hold_a_colon(tmp_path) -> None:
    folder = tmp_path / "style:2"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "only.safetensors")
    assert parse_lora(str(folder)).scale == 1.0
    assert parse_lora(f"{folder}:0.5").scale == 0.5
    assert parse_lora(str(folder)).weight_name == "only.safetensors"


@pytest.mark.parametrize(
    "text", ["me/style:strong", "me/style:nan", "me/style:inf", "me/style:0", ":1"]
)
def test_a_scale_is_a_finite_number(text) -> None:
    with pytest.raises(ValueError, match=r"expected path\[:scale\] with a finite scale"):
        parse_lora(text)


@pytest.mark.parametrize("text", ["/nowhere/style.safetensors", "style", "a/b/c:1"])
def test_a_path_that_is_not_there_is_refused(text) -> None:
    with pytest.raises(ValueError, match="which is not there"):
        parse_lora(text)


def test_a_folder_of_several_files_is_refused(tmp_path) -> None:
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"expected one \.safetensors file"):
        parse_lora(str(tmp_path))


def test_a_pickled_lora_is_refused(tmp_path) -> None:
    (tmp_path / "style.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match="Pickled weights are not read"):
        parse_lora(str(tmp_path / "style.pt"))


def test_a_lora_of_another_model_is_refused(tmp_path, tmp_path_factory) -> None:
    style_lora(teacher_dir("sd3", tmp_path_factory), tmp_path, 0)
    with pytest.raises(ValueError, match="expected a LoRA of StableDiffusionPipeline"):
        load_family(
            ModelSource.of(teacher_dir("sd_v", tmp_path_factory), teacher_lora=[str(tmp_path)])
        )


def test_a_pipeline_without_a_loader_says_what_serves(tmp_path, tmp_path_factory) -> None:
    style_lora(teacher_dir("sd3", tmp_path_factory), tmp_path, 0)
    with pytest.raises(ValueError, match="adapter saved by PEFT"):
        load_family(
            ModelSource.of(teacher_dir("dit", tmp_path_factory), teacher_lora=[str(tmp_path)])
        )


@pytest.fixture
def run(tmp_path, tmp_path_factory) -> VariationalScoreTrainer:
    """A run of one update on base + 0.5 * style."""
    folder = teacher_dir("sd_v", tmp_path_factory)
    style_lora(folder, tmp_path / "style", 0)
    args = TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_train_steps=1,
        learning_rate=1e-2,
        tuning=Tuning(rank=2),
        disable_progress_bar=True,
    )
    source = ModelSource.of(folder, teacher_lora=[f"{tmp_path / 'style'}:0.5"])
    trainer = VariationalScoreTrainer(source, args, PromptDataset(["a", "b"]))
    trainer.train()
    return trainer


@pytest.mark.full
def test_the_export_holds_the_merged_weights(run, tmp_path) -> None:
    again = trainer_of_run(tmp_path / "run")
    out = again.export(tmp_path / "out")  # compares images itself
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    saved = load_family(out).net.get_submodule(name).weight
    base = again.family.net.get_submodule(name)
    plain = load_family(run.teacher.model).net.get_submodule(name).weight
    assert float((base.base_layer.weight - plain).detach().abs().max()) > 0.05
    expected = base.base_layer.weight + base.get_delta_weight("student")
    torch.testing.assert_close(saved, expected, rtol=0, atol=1e-6)
    assert str(tmp_path / "style") in (out / "README.md").read_text()


@pytest.mark.full
def test_a_lora_export_names_the_lora_that_belongs_beside_it(run, tmp_path) -> None:
    """The card's code, with the teacher's LoRA and the student's, makes the merged student."""
    lora = run.export(tmp_path / "lora", format="lora", dtype="float32")
    code = (lora / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "set_adapters(['teacher_0', 'student'], [0.5, 1.0])" in code
    scope: dict = {}
    code = code.replace("'lora'", repr(str(lora)))
    exec(code.rpartition("pipe(")[0], scope)
    merged = load_family(run.export(tmp_path / "out"))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    cond, t = merged.encode(["a"]), torch.tensor([999.0])
    with torch.no_grad():
        ours = merged.forward(scope["pipe"].unet, x, t, cond)
        theirs = merged.forward(merged.net, x, t, cond)
    assert float((ours - theirs).abs().max()) < 1e-5


@pytest.mark.full
def test_the_lora_is_part_of_what_a_run_is(run, tmp_path) -> None:
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["teacher_lora"]
    assert facts[0]["scale"] == 0.5
    assert len(facts[0]["sha256"]) == 64
    args = run.args.model_copy(update={"resume_from_checkpoint": "latest"})
    with pytest.raises(
        ValueError, match="expected the settings of the saved run, got teacher_lora"
    ):
        VariationalScoreTrainer(run.teacher.model, args, PromptDataset(["a", "b"]))


@pytest.mark.full
def test_a_missing_lora_is_told_before_the_base_is_read(run, tmp_path) -> None:
    shutil.rmtree(tmp_path / "style")
    with pytest.raises(ValueError, match="which is not there"):
        trainer_of_run(tmp_path / "run")
