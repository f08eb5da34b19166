"""Students in every form they are saved in make the same images; wrong ones are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import teacher_dir
from torch import Tensor

from stepdistill import DistributionMatchingTrainer, TrainConfig, Tuning
from stepdistill.evaluation.systems import Loading, Source, student_sources, teacher_sources

LOADING = Loading(torch.device("cpu"))
PROMPTS = ["a red cube", "a blue ball"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of one update with a LoRA student of two steps, exported as pipeline and LoRA."""
    folder = tmp_path_factory.mktemp("run") / "dmd2_lora"
    trainer = DistributionMatchingTrainer(
        model=str(teacher_dir("sd_v", tmp_path_factory)),
        args=TrainConfig(
            output_dir=str(folder),
            max_train_steps=1,
            learning_rate=1e-2,
            disable_progress_bar=True,
            tuning=Tuning(student="lora", fake="lora", rank=2),
        ),
        train_dataset=PROMPTS,
        method="dmd2",
        method_config={"num_steps": 2, "critic_steps": 1, "guidance": 1.0, "sampler": "ode"},
    )
    trainer.train()
    trainer.export(folder / "pipeline")
    trainer.export(folder / "lora", format="lora")
    return folder


def images(source: Source) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return source.load().draw(PROMPTS, generators).images


def sources(path: Path, tmp_path: Path, counts: Any = ()) -> list[Source]:
    return student_sources(str(path), counts, LOADING, tmp_path / "exports")


def test_pipeline_lora_and_run_are_one_student(run, tmp_path) -> None:
    (pipeline,) = sources(run / "pipeline", tmp_path)
    (lora,) = sources(run / "lora", tmp_path)
    (exported,) = sources(run, tmp_path, [2])
    assert {one.steps for one in (pipeline, lora, exported)} == {2}
    assert {one.label for one in (pipeline, lora, exported)} == {"dmd2_lora"}
    expected = images(pipeline)
    torch.testing.assert_close(images(lora), expected, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(images(exported), expected)


def test_a_student_differs_from_its_teacher(run, tmp_path, tmp_path_factory) -> None:
    teacher = str(teacher_dir("sd_v", tmp_path_factory))
    loading = Loading(torch.device("cpu"), guidance=1.0)
    (base,) = teacher_sources(teacher, [2], loading)
    (student,) = sources(run / "pipeline", tmp_path)
    assert float((images(base) - images(student)).abs().max()) > 1e-2
    assert base.settings["weights"] != student.settings["weights"]


def test_steps_that_an_export_is_not_for_are_refused(run, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"exported for one of \[4\] steps, got 2"):
        sources(run / "pipeline", tmp_path, [4])


def test_another_pipeline_needs_step_counts(tmp_path, tmp_path_factory) -> None:
    with pytest.raises(ValueError, match="a run, or --steps for another pipeline"):
        sources(teacher_dir("sd_v", tmp_path_factory), tmp_path)


def test_videos_beside_images_are_refused(tmp_path, tmp_path_factory) -> None:
    (source,) = sources(teacher_dir("wan", tmp_path_factory), tmp_path, [1])
    with pytest.raises(ValueError, match="expected a pipeline that makes images"):
        source.load()
