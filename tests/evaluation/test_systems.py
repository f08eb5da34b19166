"""Students in every form they are saved in make the same images; wrong ones are refused."""

from __future__ import annotations

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.runs import teacher_dir
from torch import Tensor

from stepdistill import DistributionMatchingTrainer, TrainConfig, Tuning
from stepdistill.evaluation.systems import (
    Loading,
    Source,
    student_sources,
    teacher_sources,
    with_distinct_labels,
)
from stepdistill.loading.source import ModelSource

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
    trainer.export(folder / "lora", format="lora", dtype="float32")
    return folder


def images(source: Source) -> Tensor:
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return source.load().draw(PROMPTS, generators).images


def sources(path: Path, tmp_path: Path, counts: Any = ()) -> list[Source]:
    return student_sources(str(path), counts, LOADING, tmp_path / "exports")


@pytest.mark.full
def test_pipeline_lora_and_run_are_one_student(run, tmp_path) -> None:
    (pipeline,) = sources(run / "pipeline", tmp_path)
    (lora,) = sources(run / "lora", tmp_path)
    (exported,) = sources(run, tmp_path, [2])
    assert {one.steps for one in (pipeline, lora, exported)} == {2}
    assert {one.label for one in (pipeline, lora, exported)} == {"dmd2_lora"}
    expected = images(pipeline)
    torch.testing.assert_close(images(lora), expected, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(images(exported), expected)


@pytest.mark.full
def test_a_student_differs_from_its_teacher(run, tmp_path, tmp_path_factory) -> None:
    teacher = str(teacher_dir("sd_v", tmp_path_factory))
    loading = Loading(torch.device("cpu"), guidance=1.0)
    (base,) = teacher_sources(ModelSource(teacher), [2], loading)
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


@pytest.mark.full
def test_runs_of_one_name_are_two_students(run, tmp_path) -> None:
    other = tmp_path / "elsewhere" / run.name
    shutil.copytree(run, other)
    weights = other / "checkpoint-1"
    assert weights.is_dir()
    first, second = sources(run, tmp_path, [2]) + sources(other, tmp_path, [2])
    exports = [path for path in (tmp_path / "exports").iterdir() if path.is_dir()]
    assert len(exports) == 2
    one, two = with_distinct_labels([first, second])
    assert one.label != two.label
    assert one.label.endswith(f"/{run.name}")
    assert two.label == f"elsewhere/{run.name}"


def test_a_student_given_twice_is_refused(run, tmp_path) -> None:
    with pytest.raises(ValueError, match="student: expected each once"):
        with_distinct_labels(sources(run / "lora", tmp_path) * 2)


def test_what_an_image_depends_on_is_told(run, tmp_path, tmp_path_factory) -> None:
    """A scheduler's option, and the content of a LoRA under a path that stays."""
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_dir("sd_v", tmp_path_factory), teacher)
    style = tmp_path / "style"
    shutil.copytree(run / "lora", style)

    def settings() -> Any:
        return teacher_sources(ModelSource.of(teacher, teacher_lora=(str(style),)), [2], LOADING)[
            0
        ].settings

    before = settings()
    assert settings() == before
    config = teacher / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"clip_sample": false', '"clip_sample": true'))
    assert settings() != before
    before = settings()
    (file,) = style.glob("*.safetensors")
    save_file({k: v + 1 for k, v in load_file(file).items()}, file)
    assert settings() != before


@pytest.mark.full
def test_the_last_of_the_teacher_s_rows_lets_it_go(tmp_path_factory) -> None:
    teacher = teacher_dir("sd_v", tmp_path_factory)
    one, two = teacher_sources(ModelSource.of(teacher), [1, 2], LOADING)
    net = weakref.ref(one.load().nets[0])
    one.release()
    assert two.load().nets[0] is net()
    two.release()
    assert net() is None
