"""The launchers train, export and resume, on one process and on two; mistakes end in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.runs import teacher_dir

ROOT = Path(__file__).parents[1]
FLAGS = [
    "--tuning.rank",
    "2",
    "--train_batch_size",
    "2",
    "--max_train_steps",
    "2",
    "--disable_progress_bar",
    "--mixed_precision",
    "no",
    "--gradient_accumulation_steps",
    "1",
]


def launch(
    teacher: Path, tmp_path: Path, *flags: str, processes: int = 1, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    prompts = tmp_path / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a\nb\nc\n")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    if launcher:
        accelerate += [*launcher, "--main_process_port", str(29000 + os.getpid() % 400)]
    elif processes > 1:
        port = str(29000 + os.getpid() % 400)
        accelerate += [
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--main_process_port",
            port,
        ]
    else:
        accelerate += ["--cpu", "--num_processes", "1"]
    command = [*accelerate, str(ROOT / "train" / "distribution_matching.py")]
    command += ["--config", str(ROOT / "configs" / "methods" / "dmd2.yaml")]
    command += ["--pretrained_model_name_or_path", str(teacher)]
    command += ["--data.prompts_file", str(prompts), "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *FLAGS, *flags], env=environment, capture_output=True, text=True, timeout=280
    )


def state(run: Path, step: int) -> dict:
    return json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())


@pytest.mark.parametrize("processes", [1, 2])
def test_launcher_trains_and_exports(processes, tmp_path, tmp_path_factory) -> None:
    done = launch(teacher_dir("sd_v", tmp_path_factory), tmp_path, processes=processes)
    assert done.returncode == 0, done.stderr[-3000:]
    assert state(tmp_path / "run", 2)["world_size"] == processes
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


@pytest.mark.full
@pytest.mark.parametrize(
    "launcher",
    [("cpu2",), ("ddp", "--num_processes", "2"), ("fsdp2", "--num_processes", "2")],
    ids=lambda given: given[0],
)
def test_shipped_launcher_configs_give_two_ranks(launcher, tmp_path, tmp_path_factory) -> None:
    config = str(ROOT / "configs" / "accelerate" / f"{launcher[0]}.yaml")
    done = launch(
        teacher_dir("sd_v", tmp_path_factory),
        tmp_path,
        launcher=("--config_file", config, *launcher[1:]),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert state(tmp_path / "run", 2)["world_size"] == 2
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()


def test_a_mistake_is_one_line(tmp_path, tmp_path_factory) -> None:
    done = launch(teacher_dir("sd_v", tmp_path_factory), tmp_path, "--max_train_stepz", "3")
    assert done.returncode == 1
    assert "error: flags: expected known options" in done.stderr
    assert "max_train_steps" in done.stderr
    assert not (tmp_path / "run").exists()
