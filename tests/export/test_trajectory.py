"""TSCD and PCM students as stock pipelines: trailing DDIM, Euler, TCD; one run for all step counts.

`export_pipeline` loads each folder back and compares its image with the in-memory sampler's.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline, TCDScheduler
from support.runs import THOROUGH, TinyData, build_trainer, teacher_dir

from stepdistill import TrainConfig, Tuning, load_pipeline
from stepdistill.export.hub import files_to_push
from stepdistill.export.pipeline import RECORD
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.trainers import TrajectorySegmentedTrainer, trainer_of_run

CONFIGS = Path(__file__).parents[2] / "configs"
SHAPES: dict[str, tuple[int, ...]] = {}


def trained(family, tmp_path_factory, output_dir, method, options, steps=2, layout="lora", **more):
    """A student after `steps` real updates, then pushed off its start so that nothing is idle."""
    teacher = teacher_dir(family, tmp_path_factory)
    args = TrainConfig(
        output_dir=str(output_dir),
        max_train_steps=steps,
        train_batch_size=2,
        learning_rate=1e-3,
        disable_progress_bar=True,
        tuning=Tuning(student=layout, rank=2),
        **more,
    )
    if family not in SHAPES:
        SHAPES[family] = load_family(teacher).sample_shape()
    data = TinyData(SHAPES[family], "label" if family == "dit" else "prompt", ("x0",))
    trainer = TrajectorySegmentedTrainer(str(teacher), args, data, method, options)
    trainer.train()
    generator = torch.Generator().manual_seed(1)
    for param in trainer.bank.members("student").values():
        noise = torch.randn(param.shape, generator=generator)
        param.data += 0.05 * noise * (param.data.std() + 0.1)
    return trainer


def saved(folder: Path) -> tuple[dict, dict]:
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return json.loads((folder / RECORD).read_text()), scheduler


@pytest.mark.full
@pytest.mark.parametrize("family", THOROUGH)
def test_tscd_exports_deterministically_at_every_step_count(
    family, tmp_path, tmp_path_factory
) -> None:
    trainer = trained(family, tmp_path_factory, tmp_path / "run", "tscd", {}, steps=4)
    for num_steps in (1, 2, 4, 8):
        record, scheduler = saved(trainer.export(tmp_path / str(num_steps), num_steps=num_steps))
        assert record["num_inference_steps"] == num_steps
        assert record["call"] == {}, "the saved scheduler alone must visit the edges"
        expected = "FlowMatchEulerDiscreteScheduler" if family == "sd3" else "DDIMScheduler"
        assert scheduler["_class_name"] == expected


@pytest.mark.full
@pytest.mark.parametrize("num_phases", [1, 2, 4, 8])
@pytest.mark.parametrize("family", THOROUGH)
def test_pcm_exports_on_its_edges(family, num_phases, tmp_path, tmp_path_factory) -> None:
    options = {"num_phases": num_phases}
    trainer = trained(family, tmp_path_factory, tmp_path / "run", "pcm", options, steps=1)
    record, _ = saved(trainer.export(tmp_path / "out"))
    assert record["num_inference_steps"] == num_phases
    assert record["times"] == record["trained_times"]
    with pytest.raises(ValueError, match="phase edges"):
        trainer.export(tmp_path / "other", num_steps=3)
    assert not (tmp_path / "other").exists()


@pytest.mark.full
def test_a_segmented_student_is_not_exported_across_an_edge(tmp_path, tmp_path_factory) -> None:
    options = {"segments": (4, 2)}
    trainer = trained("sd_v", tmp_path_factory, tmp_path / "run", "tscd", options)
    with pytest.raises(ValueError, match="every segment edge"):
        trainer.export(tmp_path / "out", num_steps=1)
    assert saved(trainer.export(tmp_path / "out"))[0]["num_inference_steps"] == 2


@pytest.mark.full
def test_a_run_that_the_clock_stops_is_exported_on_the_edges_it_trained(
    tmp_path, tmp_path_factory
) -> None:
    """One update of eight, in the stage of 8 segments: the finished run's one step is refused."""
    late = {"steps": 8, "max_train_seconds": 1e-3, "ema_decay": 0.9}
    trainer = trained("sd_v", tmp_path_factory, tmp_path / "run", "tscd", {"num_steps": 1}, **late)
    assert trainer.step == 1
    with pytest.warns(UserWarning, match="stopped at update 1 of 8.*in 8 steps and not in 1"):
        record, scheduler = saved(trainer.export(tmp_path / "out"))
    assert record["visited_model_times"] == [999, 874, 749, 624, 499, 374, 249, 124]
    assert (record["call"], scheduler["_class_name"]) == ({}, "DDIMScheduler")
    with pytest.warns(UserWarning, match="stopped"), pytest.raises(ValueError, match="edge"):
        trainer.export(tmp_path / "one", num_steps=1)
    again = trainer_of_run(tmp_path / "run")
    with pytest.warns(UserWarning, match="stopped"):
        assert saved(again.export(tmp_path / "again"))[0]["times"] == record["times"]


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_lcm_on_flow_exports_without_typed_sigmas(family, tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer(
        "lcm", teacher_dir(family, tmp_path_factory), "lora", tmp_path / "run", max_train_steps=1
    )
    trainer.train()
    record, scheduler = saved(trainer.export(tmp_path / "out"))
    assert (record["num_inference_steps"], record["call"]) == (4, {})
    assert scheduler["_class_name"] == "FlowMatchLCMScheduler"


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "scheduler"), [("sd3", "FlowMatchLCMScheduler"), ("sd", "LCMScheduler")]
)
def test_stochastic_pcm_exports_in_any_number_of_steps(
    family, scheduler, tmp_path, tmp_path_factory
) -> None:
    options = {"num_phases": 1, "sampler": "renoise"}
    trainer = trained(family, tmp_path_factory, tmp_path / "run", "pcm", options, steps=1)
    for num_steps in (4, 3):
        record, config = saved(trainer.export(tmp_path / str(num_steps), num_steps=num_steps))
        assert (record["num_inference_steps"], record["call"]) == (num_steps, {})
        assert config["_class_name"] == scheduler


# ---------------------------------------------------------------- one adapter, all step counts
def recipe() -> dict:
    text = (CONFIGS / "recipes" / "sd15-tscd-one-lora.yaml").read_text()
    return yaml.safe_load(text)["method_config"]


@pytest.mark.full
def test_one_run_exports_all_step_counts_with_tcd(tmp_path, tmp_path_factory) -> None:
    """The recipe's run serves 1, 2, 4, 8 steps, each equal to stock TCD, with one scheduler."""
    trainer = trained("sd_v", tmp_path_factory, tmp_path / "run", "tscd", recipe(), steps=4)
    configs = {}
    for num_steps in (1, 2, 4, 8):
        record, configs[num_steps] = saved(
            trainer.export(tmp_path / str(num_steps), num_steps=num_steps)
        )
        assert record["num_inference_steps"] == num_steps
        assert record["call"] == {"eta": 0.3}
        assert len(record["trained_times"]) == 40
        assert configs[num_steps]["_class_name"] == "TCDScheduler"
    assert all(config == configs[1] for config in configs.values())
    assert trainer.export(tmp_path / "default")
    assert saved(tmp_path / "default")[0]["num_inference_steps"] == 4


@pytest.mark.full  # by default test_fresh_process.py, of a card's code
def test_one_adapter_file_makes_the_exported_images_on_the_stock_teacher(
    tmp_path, tmp_path_factory
) -> None:
    """Teacher + load_lora_weights + TCDScheduler: the images of the four exports, by one file."""
    trainer = trained("sd_v", tmp_path_factory, tmp_path / "run", "tscd", recipe(), steps=4)
    lora = trainer.export(tmp_path / "lora", format="lora", dtype="float32")
    stock = DiffusionPipeline.from_pretrained(teacher_dir("sd_v", tmp_path_factory))
    stock.load_lora_weights(str(lora))

    def image(pipe, num_steps):
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            "a",
            num_inference_steps=num_steps,
            guidance_scale=1.0,
            eta=0.3,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images

    made = []
    for num_steps in (1, 2, 4, 8):
        out = trainer.export(tmp_path / str(num_steps), num_steps=num_steps)
        exported = DiffusionPipeline.from_pretrained(out)
        stock.scheduler = TCDScheduler.from_pretrained(out, subfolder="scheduler")
        made.append(image(stock, num_steps))
        assert float((made[-1] - image(exported, num_steps)).abs().max()) < 1e-3
    for other in made[1:]:
        assert float((made[0] - other).abs().max()) > 1e-2, "step counts give images of their own"


def test_no_stock_tcd_no_export(tmp_path, tmp_path_factory) -> None:
    trainer = trained("dit", tmp_path_factory, tmp_path / "run", "tscd", recipe())
    with pytest.raises(ValueError, match="without `eta`"):
        trainer.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------ TCD on flow: a scheduler of our own
@pytest.mark.full
@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_tcd_on_flow_exports_with_its_scheduler_beside_it(
    family, tmp_path, tmp_path_factory
) -> None:
    """export compares with the sampler; here Diffusers alone runs the copy in the folder."""
    trainer = trained(family, tmp_path_factory, tmp_path / "run", "tscd", recipe())
    out = trainer.export(tmp_path / "out")
    record, scheduler = saved(out)
    assert (record["call"], record["custom_code"]) == ({}, "tcd_flow_match_scheduler")
    assert (scheduler["_class_name"], scheduler["gamma"]) == ("FlowMatchTCDScheduler", 0.3)
    copied = out / "scheduler" / "tcd_flow_match_scheduler.py"
    assert copied.read_text() == (CONFIGS.parent / "pipelines" / copied.name).read_text()
    assert "trust_remote_code=True" in (out / "README.md").read_text()
    without = dict.fromkeys(record["load_without"])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(out, **without)

    def image(pipe):
        pipe.set_progress_bar_config(disable=True)
        torch.manual_seed(0)
        call = {"guidance_scale": record["guidance_scale"], "output_type": "pt"}
        generator = torch.default_generator
        return pipe("a", num_inference_steps=4, generator=generator, **call).images

    stock = DiffusionPipeline.from_pretrained(out, trust_remote_code=True, **without)
    ours = load_pipeline(out)
    assert type(stock.scheduler).__module__ != type(ours.scheduler).__module__
    torch.testing.assert_close(image(stock), image(ours), rtol=0, atol=1e-5)
    assert teacher_facts(out).setting.shift == scheduler["shift"], "it can be a teacher again"


@pytest.mark.full
def test_a_lora_of_a_tcd_flow_student_carries_the_scheduler(tmp_path, tmp_path_factory) -> None:
    trainer = trained("sd3", tmp_path_factory, tmp_path / "run", "tscd", recipe())
    out = trainer.export(tmp_path / "out", format="lora")
    card = (out / "README.md").read_text()
    assert "FlowMatchTCDScheduler = get_class_from_dynamic_module(" in card
    assert "'tcd_flow_match_scheduler.py', 'scheduler', 'FlowMatchTCDScheduler'" in card
    assert (out / "scheduler" / "tcd_flow_match_scheduler.py").is_file()
    assert "scheduler/tcd_flow_match_scheduler.py" in files_to_push(out)
    (out / "scheduler" / "tcd_flow_match_scheduler.py").write_text("print()")
    with pytest.raises(ValueError, match="tcd_flow_match_scheduler"):
        files_to_push(out)
