"""When activations are recomputed and how the switch is spelt; freed memory that is kept."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stepdistill import TrainConfig
from stepdistill.config.files import parse_run_config
from stepdistill.training.memory import (
    AUTO_PARAMETERS,
    MMAP_THRESHOLD,
    checkpoints_activations,
    keep_freed_memory,
)


def net(count: int) -> nn.Module:
    return nn.Linear(count, 1, bias=False, device="meta")


@pytest.mark.parametrize(("count", "expected"), [(AUTO_PARAMETERS, True), (1000, False)])
def test_auto_recomputes_in_big_denoisers(count: int, expected: bool) -> None:
    assert checkpoints_activations(TrainConfig(), net(count)) is expected


def test_adapters_do_not_make_a_denoiser_big() -> None:
    small = net(1000)
    small.lora_A = nn.ModuleDict({"student": net(AUTO_PARAMETERS)})
    small_in = nn.ModuleDict({"layer": small})
    assert not checkpoints_activations(TrainConfig(), small_in)


def test_a_quantised_base_always_recomputes() -> None:
    args = TrainConfig(tuning={"base_quantization": "int8"})
    assert checkpoints_activations(args, net(1000))


@pytest.mark.parametrize("told", [True, False])
def test_what_is_told_counts(told: bool) -> None:
    args = TrainConfig(gradient_checkpointing=told)
    assert checkpoints_activations(args, net(AUTO_PARAMETERS)) is told
    assert checkpoints_activations(args, net(1000)) is told


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "auto"),
        (["--gradient_checkpointing"], True),
        (["--gradient_checkpointing", "--seed", "1"], True),
        (["--gradient_checkpointing", "false"], False),
        (["--gradient_checkpointing", "auto"], "auto"),
        (["--no-gradient_checkpointing"], False),
        (["--gradient_checkpointing=true"], True),
    ],
)
def test_the_switch_is_a_flag_or_takes_a_value(flags: list[str], expected: bool | str) -> None:
    run = parse_run_config(["--pretrained_model_name_or_path", "m", "--method", "dmd2", *flags])
    assert run.gradient_checkpointing == expected


# ------------------------------------------------------------------------------ memory of the CPU
def _faults() -> int:
    """Pages that the system maps for three rounds of the same tensors, once three have passed."""
    for _ in range(3):
        [torch.ones(2**20) for _ in range(8)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        [torch.ones(2**20) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def _before_and_after() -> None:
    for name in [n for n in os.environ if n.startswith(("MALLOC_", "GLIBC_"))]:
        del os.environ[name]
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**17)  # else what is at its heap's end decides
    print(_faults(), keep_freed_memory(torch.device("cpu")), _faults())


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tunes glibc's malloc")
def test_a_run_on_the_cpu_maps_its_pages_once() -> None:
    # Of a heap that an earlier test has grown, freed tensors come back whatever the settings.
    code = "from training.test_memory import _before_and_after as both; both()"
    tests, root = Path(__file__).parents[1], Path(__file__).parents[2]
    env = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{root}"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, kept, after = done.stdout.split()
    assert kept == "True"
    assert int(before) > 10_000
    assert int(after) < 0.05 * int(before)


def test_a_malloc_that_the_environment_tunes_is_left_alone(monkeypatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory(torch.device("cpu"))


def test_memory_beside_a_gpu_is_left_alone() -> None:
    assert not keep_freed_memory(torch.device("cuda"))
