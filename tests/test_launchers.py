"""The launchers train, export and resume, on one process and on two; mistakes end in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from support.processes import LIMIT_S, forked_ranks, run, run_script, status_of
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


def words(teacher: Path, tmp_path: Path, *flags: str) -> list[str]:
    """The script and its options."""
    prompts = tmp_path / "prompts.txt"
    if not prompts.exists():
        prompts.write_text("a\nb\nc\n")
    command = [str(ROOT / "train" / "distribution_matching.py")]
    command += ["--config", str(ROOT / "configs" / "methods" / "dmd2.yaml")]
    command += ["--pretrained_model_name_or_path", str(teacher)]
    command += ["--data.prompts_file", str(prompts), "--output_dir", str(tmp_path / "run")]
    return [*command, *FLAGS, *flags]


def launch(teacher: Path, tmp_path: Path, *launcher: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *words(teacher, tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def state(run: Path, step: int) -> dict:
    return json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())


def assert_trained(run: Path, processes: int) -> None:
    assert state(run, 2)["world_size"] == processes
    assert (run / "pipeline" / "model_index.json").is_file()


PORT = ("--main_process_port", str(29000 + os.getpid() % 400))


# README's command is one process's, and tests/test_readme.py runs it; two start by shipped files.
@pytest.mark.every
@pytest.mark.parametrize("processes", [1, 2])
def test_launcher_trains_and_exports(processes, tmp_path, tmp_path_factory) -> None:
    kind = ("--cpu",) if processes == 1 else ("--multi_gpu", *PORT)
    teacher = teacher_dir("sd3", tmp_path_factory)
    done = launch(teacher, tmp_path, *kind, "--num_processes", str(processes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained(tmp_path / "run", processes)


@pytest.mark.full
def test_two_processes_train_and_export(tmp_path, tmp_path_factory) -> None:
    """The script as the launchers start it on two processes."""
    argv = words(teacher_dir("sd3", tmp_path_factory), tmp_path)
    children = forked_ranks(2, lambda _: run_script(*argv), tmp_path)
    statuses = [status_of(child) for child in children]
    assert statuses == [0, 0], (tmp_path / "rank0.txt").read_text()[-3000:]
    assert_trained(tmp_path / "run", 2)


@pytest.mark.full
@pytest.mark.sampled_in_full("fsdp2")
@pytest.mark.parametrize(
    "launcher",
    [("cpu2",), ("ddp", "--num_processes", "2"), ("fsdp2", "--num_processes", "2")],
    ids=lambda given: given[0],
)
def test_shipped_launcher_configs_give_two_ranks(launcher, tmp_path, tmp_path_factory) -> None:
    config = str(ROOT / "configs" / "accelerate" / f"{launcher[0]}.yaml")
    teacher = teacher_dir("sd3", tmp_path_factory)
    done = launch(teacher, tmp_path, "--config_file", config, *launcher[1:], *PORT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_trained(tmp_path / "run", 2)


def test_a_mistake_is_one_line(tmp_path, tmp_path_factory) -> None:
    argv = words(teacher_dir("sd3", tmp_path_factory), tmp_path, "--max_train_stepz", "3")
    done = run(partial(run_script, *argv))
    assert done.returncode == 1
    assert "error: flags: expected known options" in done.stderr
    assert "max_train_steps" in done.stderr
    assert not (tmp_path / "run").exists()
