"""Students of two experts (Wan 2.2 A14B): calls of each, boundaries, files, and one of two runs."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.runs import build_trainer, teacher_dir

from stepdistill import cli
from stepdistill.core.path import FlowPath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.export.experts import boundary_ratio, calls_of
from stepdistill.export.lora_formats import adapters_of
from stepdistill.export.pipeline import RECORD
from stepdistill.export.schedulers import stock_sampler
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.families.wan import WanFamily
from stepdistill.loading.expert_files import expert_of
from stepdistill.loading.source import ModelSource
from stepdistill.pairs.dataset import PairDataset
from stepdistill.testing.tiny_video import tiny_wan, wan_scheduler

BOUNDARY = {"t2v": 0.875, "i2v": 0.9}


def stock_asks(ratio: float | None, timesteps: torch.Tensor) -> tuple[int, int]:
    """(calls of transformer, of transformer_2) by the stock loop's own rule."""
    high = sum(ratio is None or bool(t >= ratio * 1000) for t in timesteps)
    return high, len(timesteps) - high


@pytest.mark.parametrize("kind", BOUNDARY)
def test_which_expert_a_call_goes_to_for_every_grid(kind) -> None:
    """Steps 1 to 8, shifts 3 to 12: as trained, by the exported scheduler's times and by UniPC's
    whole ones."""
    counted = {}
    for shift in (3, 5, 7, 9, 12):
        for steps in range(1, 9):
            grid, trained = uniform_grid(steps, shift), BOUNDARY[kind]
            exact = Fraction(str(trained))
            raw = exact / (shift - (shift - 1) * exact)  # the boundary on the grid before its shift
            high = sum(Fraction(i, steps) >= raw for i in range(1, steps + 1))
            ratio = boundary_ratio(grid, trained)
            made = stock_sampler(wan_scheduler(), FlowPath(), SamplerSpec(grid, "ode"))
            made.scheduler.set_timesteps(steps)
            whole = torch.tensor([int(1000 * t + 1e-9) for t in grid])
            asked = [calls_of(grid, trained)]
            asked += [stock_asks(ratio, times) for times in (made.scheduler.timesteps, whole)]
            assert asked == [(high, steps - high)] * 3, (shift, steps)
            counted[shift, steps] = high
    assert [counted[shift, 4] for shift in (5, 7, 9)] == {"t2v": [2, 3, 3], "i2v": [2, 2, 3]}[kind]
    assert counted[5, 2] == 1


def test_a_boundary_upon_a_step_is_moved_between_two() -> None:
    assert boundary_ratio(uniform_grid(4, 5.0), 0.875) == 0.875
    assert boundary_ratio(uniform_grid(4, 7.0), 0.875) == pytest.approx(0.7875)
    assert boundary_ratio(uniform_grid(1, 5.0), 0.875) is None
    with pytest.raises(ValueError, match="two times are within one of 1000"):
        boundary_ratio((0.8752, 0.8751), 0.87515)


def moved(trainer):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in trainer.bank.members("student").values():
            param += 0.05 * torch.randn(param.shape, generator=generator)
    return trainer


def trained(tmp_path: Path, teacher: Path, expert: str = "both", **options):
    source = ModelSource(str(teacher), expert=expert)
    grid = {"num_steps": 4, "shift": 5.0, "critic_steps": 1}
    made = {"method_options": grid, "max_train_steps": 1, **options}
    return build_trainer("tdm", source, "lora", tmp_path / f"run_{expert}", **made)


@pytest.mark.full
@pytest.mark.parametrize("family", ["wan_experts", "wan_i2v_experts"])
def test_both_in_one_run_make_the_stock_pipeline_and_two_files(
    family, tmp_path, tmp_path_factory
) -> None:
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(trained(tmp_path, teacher))
    out = trainer.export(tmp_path / "out")  # compares images
    record = json.loads((out / RECORD).read_text())
    assert record["experts"]["calls"] == {"high": 2, "low": 2}
    cls = WanImageToVideoPipeline if "i2v" in family else WanPipeline
    stock = cls.from_pretrained(out)
    assert stock.config.boundary_ratio == record["experts"]["trained_boundary"]
    assert record["call"] == {}
    assert record["typed"] == {"num_inference_steps": 4, "guidance_scale": 1.0}

    lora = trainer.export(tmp_path / "lora", format="lora", dtype="float32")
    names = {"transformer": "high_noise_lora.safetensors"}
    names["transformer_2"] = "low_noise_lora.safetensors"
    record = json.loads((lora / RECORD).read_text())
    assert record["lora"]["files"] == names
    base = cls.from_pretrained(teacher)
    for component, name in names.items():
        expert = name.partition("_")[0]
        with safe_open(lora / name, framework="pt") as file:
            assert file.metadata()["expert"] == f"{expert}_noise"
        second = {"load_into_transformer_2": True} if expert == "low" else {}
        base.load_lora_weights(lora, weight_name=name, adapter_name="s", **second)
        theirs = adapters_of(getattr(base, component), "s")
        ours = adapters_of(getattr(trainer.bank.base_of("student"), expert), "student")
        assert theirs.keys() == ours.keys()
        for module, one in ours.items():
            assert torch.allclose(theirs[module].delta(), one.delta(), atol=1e-6), module
    card = (lora / "README.md").read_text()
    assert "load_into_transformer_2=True" in card
    assert "2 calls of high noise, 2 of low" in card


@pytest.mark.full
@pytest.mark.parametrize(
    ("form", "family"), [("kohya", "wan_experts"), ("comfyui", "wan_i2v_experts")]
)
def test_other_tools_files_are_two_and_read_back(form, family, tmp_path, tmp_path_factory) -> None:
    """Our own loader and stock Diffusers make the student of them, each file on its expert."""
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = moved(trained(tmp_path, teacher))
    out = trainer.export(tmp_path / "mine", format=form, dtype="float32")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == ["mine_high_noise_lora.safetensors", "mine_low_noise_lora.safetensors"]
    assert [expert_of(out / name) for name in files] == ["high", "low"]

    stock = type(trainer.family.pipeline).from_pretrained(teacher)
    for name in files:
        second = {"load_into_transformer_2": True} if "low" in name else {}
        stock.load_lora_weights(out, weight_name=name, adapter_name="s", **second)
    pair = tuple(str(out / name) for name in reversed(files))
    ours = load_family(ModelSource(str(teacher), teacher_lora=pair))
    x, t = torch.randn(2, *trainer.family.sample_shape()), torch.tensor([0.95, 0.5]).double()
    cond = trainer.family.encode(["a", "b"])
    with torch.no_grad():
        wanted = trainer.bank["student"](x, t, cond).raw
        plain = trainer.bank["teacher"](x, t, cond).raw
        for made in (ours, type(trainer.family)(stock)):
            raw = made.forward(made.net, x, made.path.model_time(t), cond)
            assert torch.allclose(raw, wanted, atol=1e-5)
    assert float((wanted - plain).flatten(1).abs().amax(1).min()) > 1e-3  # of both rows

    copied = tmp_path / "copied" / files[1]  # the high file under the low one's name
    copied.parent.mkdir()
    copied.write_bytes((out / files[0]).read_bytes())
    nameless = copied.with_name("style.safetensors")
    save_file(load_file(out / files[0]), nameless)
    for given in ((pair[0],), (pair[1],), (pair[1], str(copied)), (*pair, str(nameless))):
        with pytest.raises(ValueError, match="teacher_lora: expected LoRAs of both experts, each"):
            teacher_facts(ModelSource(str(teacher), teacher_lora=given))


@pytest.mark.full
def test_one_step_is_the_high_expert_alone(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("wan_experts", tmp_path_factory)
    grid = {"num_steps": 1, "shift": 5.0, "critic_steps": 1}
    trainer = moved(build_trainer("dmd2", teacher, "full", tmp_path / "run", method_options=grid))
    stock = WanPipeline.from_pretrained(trainer.export(tmp_path / "out"))
    assert stock.transformer_2 is None
    assert stock.config.boundary_ratio is None


@pytest.mark.full
def test_an_expert_a_run_and_one_pipeline_of_both(tmp_path, tmp_path_factory) -> None:
    """High first; its states train the low one, whose export holds both."""
    teacher = teacher_dir("wan_experts", tmp_path_factory)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")

    high = trained(tmp_path, teacher, "high")
    assert high.method.sampler().times == uniform_grid(4, 5.0)[:2]
    high.train()
    moved(high)
    half = high.export(tmp_path / "high")
    record = json.loads((half / RECORD).read_text())
    assert (record["expert"], record["num_inference_steps"]) == ("high", 2)

    states = tmp_path / "states"
    command = f"pairs --pretrained_model_name_or_path {half} --prompts_file {prompts}"
    cli.main([*command.split(), "--num_pairs", "3", "--pairs_dir", str(states)])
    data = PairDataset(states)
    assert data.settings.until == pytest.approx(uniform_grid(4, 5.0)[2])
    assert set(data[0]) == {"prompt", "start"}

    low = trained(tmp_path, teacher, "low", dataset=data)
    assert low.method.sampler().times == uniform_grid(4, 5.0)[2:]
    low.train()
    moved(low)
    whole = low.export(tmp_path / "whole")  # found by the states; compares images
    record = json.loads((whole / RECORD).read_text())
    assert record["num_inference_steps"] == 4
    stock = WanPipeline.from_pretrained(whole)
    for name, trainer in (("transformer", half), ("transformer_2", teacher)):
        mine = WanPipeline.from_pretrained(trainer).components[name]
        same = torch.equal(
            mine.blocks[0].attn1.to_q.weight,
            getattr(stock, name).blocks[0].attn1.to_q.weight,
        )
        assert same == (name == "transformer"), name  # the low one has its adapter in it

    files = [t.export(tmp_path / f"lora_{t.family.expert}", format="lora") for t in (high, low)]
    assert [expert_of(next(f.glob("*.safetensors"))) for f in files] == ["high", "low"]
    assert (files[0] / "scheduler").is_dir()
    assert json.loads((files[0] / RECORD).read_text())["num_inference_steps"] == 4
    card = (files[1] / "README.md").read_text()
    assert "load_into_transformer_2=True" in card
    assert "other expert's file is its own run's" in card

    for wrong, match in (
        (None, "got none"),
        (files[0], "got one of high"),  # a LoRA
        (tmp_path, "got none"),
    ):
        low.facts["high_student"] = None
        with pytest.raises(ValueError, match=f"high_student: .*{match}"):
            low.export(tmp_path / "other", high_student=wrong)
    record_file = half / RECORD
    text = record_file.read_text()
    record_file.write_text(text.replace('"expert": "high"', '"expert": "low"'))
    with pytest.raises(ValueError, match=r"high_student: .*got one of low"):
        low.export(tmp_path / "other", high_student=half)
    record_file.write_text(text.replace('"kind": "ode"', '"kind": "renoise"'))
    with pytest.raises(ValueError, match="of the same steps"):
        low.export(tmp_path / "other", high_student=half)


@pytest.mark.full
def test_swapped_files_are_refused_before_loading(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("wan_experts", tmp_path_factory)
    lora = moved(trained(tmp_path, teacher)).export(tmp_path / "lora", format="lora")
    for expert, other in (("high", "low"), ("low", "high")):
        file = str(lora / f"{other}_noise_lora.safetensors")
        with pytest.raises(
            ValueError, match=f"teacher_lora: expected a LoRA of the {expert}-noise"
        ):
            teacher_facts(ModelSource(str(teacher), teacher_lora=(file,), expert=expert))
    names = {
        "wan2.2_t2v_A14b_high_noise_lora_rank64_lightx2v_4step.safetensors": "high",
        "Wan2_2_Lightning_T2V-A14B-4steps-lora_LOW_fp16.safetensors": "low",
        "slow_motion.safetensors": None,
        "highlights.safetensors": None,
    }
    assert {name: expert_of(Path(name)) for name in names} == names


def test_guidance_2_is_not_needed() -> None:
    """guidance_scale 1 alone: no null pass of either expert."""
    pipeline = WanFamily(tiny_wan(boundary_ratio=0.875)).pipeline  # without dropout
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for net in (pipeline.transformer, pipeline.transformer_2):
        net.register_forward_pre_hook(lambda *_: rows.append(1))
    size = {"num_frames": 5, "height": 16, "width": 32}
    calls = [{"guidance_scale": 1.0, **extra} for extra in ({}, {"guidance_scale_2": 3.0})]
    made = [
        pipeline(
            "a",
            num_inference_steps=4,
            output_type="pt",
            **size,
            **call,
            generator=torch.Generator().manual_seed(0),
        ).frames
        for call in calls
    ]
    assert len(rows) == 8
    assert torch.equal(*made)
