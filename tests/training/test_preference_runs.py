"""preference's runs from the command line on a model like SDXL-Turbo: ln 2 at first, stock export,
and what is refused before a weight is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
)
from PIL import Image
from support.runs import teacher_dir

from stepdistill import PreferenceTrainer, TrainConfig
from stepdistill.cli import main
from stepdistill.config.files import parse_run_config
from stepdistill.data.stream import PromptDataset
from stepdistill.families.registry import load_family
from stepdistill.families.schedule import visited_times
from stepdistill.trainers import trainer_of_run
from stepdistill.training.sources import open_dataset

TRAILING: dict[str, Any] = {"timestep_spacing": "trailing"}


def turbo(family: str, folder: Path, tmp_path_factory: Any, cls: Any, **options: Any) -> Path:
    """A tiny teacher saved with the scheduler of a distilled model."""
    pipeline = load_family(teacher_dir(family, tmp_path_factory)).pipeline
    pipeline.register_modules(scheduler=cls.from_config(pipeline.scheduler.config, **options))
    pipeline.save_pretrained(folder / "turbo")
    return folder / "turbo"


def pairs(folder: Path) -> Path:
    """Four pairs: the brighter of two images was chosen."""
    rows = []
    for i in range(8):
        level = 200 - 20 * (i // 2) if i % 2 == 0 else 20
        Image.new("RGB", (16, 16), (level, level, level)).save(folder / f"{i}.png")
    for i in range(4):
        row = {"text": f"thing {i}", "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png"}
        rows.append(json.dumps(row))
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    return folder / "pairs.jsonl"


def words(model: Path, folder: Path, *flags: str) -> list[str]:
    argv = ["--method", "pso", "--pretrained_model_name_or_path", str(model)]
    argv += ["--data.preferences_file", str(folder / "pairs.jsonl")]
    argv += ["--output_dir", str(folder / "run"), "--train_batch_size", "2", "--logging_steps", "1"]
    argv += ["--gradient_accumulation_steps", "1", "--mixed_precision", "no"]
    return [*argv, "--disable_progress_bar", *flags]


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "cls", "flags"),
    [
        ("sd", EulerAncestralDiscreteScheduler, ["--tuning.student", "lora", "--tuning.rank", "2"]),
        ("sd", LCMScheduler, ["--tuning.student", "full"]),
    ],
)
def test_a_turbo_model_from_the_command_line(
    family, cls, flags, tmp_path, tmp_path_factory
) -> None:
    """Its export by stock Diffusers makes what the tuned network makes in memory, at its steps."""
    options = TRAILING if cls is not LCMScheduler else {}
    model = turbo(family, tmp_path, tmp_path_factory, cls, **options)
    pairs(tmp_path)
    argv = words(model, tmp_path, *flags, "--max_train_steps", "6", "--learning_rate", "1e-3")
    main(["train", *argv, "--cache_dir", str(tmp_path / "cache")])
    logs = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first, *_, last = [row for row in logs if "student/loss" in row]
    assert first["student/loss"] == pytest.approx(math.log(2.0), abs=1e-5)
    assert abs(first["student/margin"]) < 1e-5
    assert last["student/margin"] > 0
    assert last["student/loss"] < math.log(2.0)

    folder = tmp_path / "run" / "pipeline"
    record = json.loads((folder / "distillation.json").read_text())
    assert (record["num_inference_steps"], record["guidance_scale"]) == (4, 1.0)
    stock = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(stock.scheduler, cls)
    trainer = trainer_of_run(tmp_path / "run")
    call = {"prompt": "thing 1", "num_inference_steps": 4, "guidance_scale": 1.0}
    call |= {"output_type": "pt", "height": 16, "width": 16}
    images = []
    with trainer.student().in_pipeline() as ours:  # type: ignore[attr-defined]
        for pipeline in (stock, ours):
            pipeline.set_progress_bar_config(disable=True)
            made = pipeline(**call, generator=torch.Generator().manual_seed(0)).images
            images.append(made)
    assert float((images[0] - images[1]).abs().max()) < 1e-4
    assert visited_times(stock.scheduler, trainer.family.path) == tuple(record["trained_times"])


@pytest.mark.full
def test_a_model_whose_call_is_told_times_learns_online(tmp_path, tmp_path_factory) -> None:
    """As DMD2's SDXL: LCM at 999, 749, 499, 249, which its scheduler by itself would not visit."""
    model = turbo("sd", tmp_path, tmp_path_factory, LCMScheduler)
    times = (1.0, 0.75, 0.5, 0.25)
    options = {"call_times": times, "reward": {"kind": "contrast"}, "beta": 500.0}
    args = TrainConfig(
        output_dir=str(tmp_path / "run"),
        max_train_steps=3,
        train_batch_size=2,
        learning_rate=1e-3,
        tuning={"student": "lora", "rank": 2},
        logging_steps=1,
        disable_progress_bar=True,
    )
    trainer = PreferenceTrainer(
        str(model),
        args,
        PromptDataset(["thing 1", "thing 2"]),
        method="online_preference",
        method_config=options,
        scorers={"contrast": lambda images, by: images.flatten(1).std(dim=1)},
    )
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "student/loss" in row)
    assert first["student/loss"] == pytest.approx(math.log(2.0), abs=1e-4)
    assert first["student/tied"] == 0.0
    assert trainer.method.sampler().times == times
    folder = trainer.export(tmp_path / "out")
    record = json.loads((folder / "distillation.json").read_text())
    stock = DiffusionPipeline.from_pretrained(folder)
    call = {"num_inference_steps": 4, **record["call"], "guidance_scale": 1.0}
    stock("thing 1", **call, output_type="pt", height=16, width=16)
    assert isinstance(stock.scheduler, LCMScheduler)
    assert visited_times(stock.scheduler, trainer.family.path) == times


@pytest.mark.usefixtures("no_loading")
def test_what_is_refused_before_a_weight_is_read(tmp_path, tmp_path_factory) -> None:
    model = turbo("sd", tmp_path, tmp_path_factory, EulerDiscreteScheduler, **TRAILING)
    pairs(tmp_path)

    def trainer(data: Any = None, **options: Any) -> None:
        run = parse_run_config(words(model, tmp_path))
        args = TrainConfig(output_dir=str(tmp_path / "run"))
        dataset = open_dataset(run) if data is None else data
        PreferenceTrainer(str(model), args, dataset, method_config=options)

    with pytest.raises(
        ValueError, match=r"expected batch fields .*rejected.*--data\.preferences_f"
    ):
        trainer(PromptDataset(["a"]))
    with pytest.raises(
        ValueError, match=r"student_times: expected .* \(1\.0, 0\.75, 0\.5, 0\.25\)"
    ):
        trainer(student_times=[1.0, 0.7, 0.4, 0.2])
    (tmp_path / "7.png").unlink()
    with pytest.raises(ValueError, match=r"pairs\.jsonl:4: expected every file to exist, got no"):
        trainer()


@pytest.mark.usefixtures("no_loading")
def test_an_export_that_its_scheduler_alone_does_not_sample(tmp_path, tmp_path_factory) -> None:
    model = turbo("sd", tmp_path, tmp_path_factory, EulerDiscreteScheduler, **TRAILING)
    record: dict[str, Any] = {"guided": False, "call": {}, "num_inference_steps": 2}

    def trainer(**changes: Any) -> None:
        (model / "distillation.json").write_text(json.dumps({**record, **changes}))
        args = TrainConfig(output_dir=str(tmp_path / "run"))
        PreferenceTrainer(str(model), args, PromptDataset(["a"]))

    told = {**record, "call": {"timesteps": [999, 749]}}
    (model / "distillation.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="expected batch fields"):  # what comes after
        PreferenceTrainer(
            str(model),
            TrainConfig(output_dir=str(tmp_path / "run")),
            PromptDataset(["a"]),
            method_config={"num_steps": 2, "call_times": (1.0, 0.75)},
        )
    for changes, got in (
        ({"call": {"timesteps": [999, 749]}}, r"whose call is told \['timesteps'\]"),
        ({"guided": True}, "one that is guided"),
    ):
        with pytest.raises(ValueError, match=f"model: expected a distilled pipeline .*{got}"):
            trainer(**changes)
    with (
        pytest.warns(UserWarning, match=r"num_steps 4: .* was exported for 2 steps"),
        pytest.raises(ValueError, match="expected batch fields"),
    ):
        trainer()


def test_a_pair_without_a_winner_ends_the_command_in_one_line(tmp_path, tmp_path_factory) -> None:
    pairs(tmp_path).write_text('{"text": "a", "chosen": "0.png", "rejected": null}')
    model = teacher_dir("sd", tmp_path_factory)
    with pytest.raises(SystemExit, match=r"pairs\.jsonl:1: .*: a pair without a winner") as ended:
        main(["train", *words(model, tmp_path)])
    assert len(str(ended.value).splitlines()) == 1
