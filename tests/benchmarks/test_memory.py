"""Forecast peak memory over the measured peak, on CPU-sized models.

    pytest -m benchmark -n 0 -s tests/benchmarks/test_memory.py

Measured in a fresh process: the resident set's high-water mark over two steps, less what the same
process held after the same run on a tiny model, which loads libraries and kernels. Large blocks go
back to the system when freed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from rich.console import Console
from rich.table import Table

from stepdistill.config.run import RunConfig
from stepdistill.planning.forecast import forecast
from stepdistill.testing import tiny_parts
from stepdistill.testing.tiny import TINY

pytestmark = pytest.mark.benchmark

CHILD = """
import ctypes, gc, json, sys, torch
torch.set_num_threads(1)
from stepdistill.trainers import DistillationTrainer
from stepdistill.config.run import RunConfig
def status(key):
    line = next(x for x in open("/proc/self/status") if x.startswith(key))
    return int(line.split()[1]) * 1024
for run in sys.argv[1:]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    trainer = DistillationTrainer.from_config(RunConfig(**json.loads(run)))
    trainer.train()
    peak = status("VmHWM") - before
    del trainer
print("PEAK", peak)
"""

CASES: dict[str, dict[str, Any]] = {
    "dmd2, LoRA": {"tuning": {"rank": 16}},
    "dmd2, full": {"tuning": {"student": "full", "fake": "full"}},
    "dmd2, LoRA, checkpointing": {"tuning": {"rank": 16}, "gradient_checkpointing": True},
    "dmd2, LoRA on an int8 base": {"tuning": {"rank": 16, "base_quantization": "int8"}},
    "vsd, full student": {"method": "vsd", "tuning": {"student": "full", "fake": "lora"}},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of 0.2 M parameters."""
    folder = tmp_path_factory.mktemp("memory") / "tiny"
    TINY["sd_v"]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion of 34 M parameters at 32 x 32 latents."""
    with tiny_parts.seeded(0):
        pipeline: StableDiffusionPipeline = TINY["sd_v"]()
        unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(128, 256, 256),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=tiny_parts.TEXT_WIDTH,
            attention_head_dim=8,
        )
    pipeline.register_modules(unet=unet)
    folder = tmp_path_factory.mktemp("memory") / "teacher"
    pipeline.save_pretrained(folder)
    return folder


def measured(*runs: dict[str, Any]) -> int:
    """Bytes of the last of the runs, all in one process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *map(json.dumps, runs)],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split("PEAK")[-1])


@pytest.mark.parametrize("case", CASES)
def test_forecast_over_measured_peak(case: str, teacher: Path, tiny: Path, tmp_path: Path) -> None:
    if "int8" in case:
        pytest.importorskip("torchao", reason="int8 bases need torchao")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a thing\nanother\n")
    run = {
        "pretrained_model_name_or_path": str(teacher),
        "method": "dmd2",
        "method_config": {"num_steps": 1, "critic_steps": 1},
        "data": {"prompts_file": str(prompts)},
        "output_dir": str(tmp_path / "run"),
        "train_batch_size": 4,
        "max_train_steps": 2,
        "checkpointing_steps": 0,
        "disable_progress_bar": True,
        **CASES[case],
    }
    first = {
        **run,
        "pretrained_model_name_or_path": str(tiny),
        "output_dir": str(tmp_path / "tiny"),
    }
    plan, peak = forecast(RunConfig(**run)), measured(first, run)
    table = Table("what", "figure", title=case)
    table.add_row("forecast", f"{plan.peak / 2**20:.0f} MiB")
    table.add_row("measured", f"{peak / 2**20:.0f} MiB")
    table.add_row("ratio", f"{plan.peak / peak:.3f}")
    Console().print(table)
    assert 0.85 <= plan.peak / peak <= 1.15
