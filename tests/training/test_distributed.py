"""Two gloo processes equal one process with the same global batch, and each other bit for bit.

The GAN case is the mixed graph: the student's gradient flows through the fake's adapter on the
same base. Accumulation is 2, EMA is on, AdamW is the optimiser.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runs import teacher_dir

SCRIPT = Path(__file__).parents[1] / "support" / "distributed.py"


def run(world: int, teacher: Path, out: Path, case: str, layout: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    port = ["--master_port", str(29500 + os.getpid() % 500)]
    args = [str(SCRIPT), str(teacher), str(out), str(4 // world), case, layout]
    done = subprocess.run(
        [*launcher, *port, *args], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("case", "layout"), [("dmd2_gan", "lora"), ("cd", "full")])
def test_two_processes_equal_one(case, layout, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd_v", tmp_path_factory)
    for world in (1, 2):
        run(world, teacher, tmp_path / f"w{world}", case, layout)
        facts = json.loads((tmp_path / f"w{world}" / "rank0.json").read_text())
        assert facts["world_size"] == world
    one = load_file(tmp_path / "w1" / "rank0.safetensors")
    two = load_file(tmp_path / "w2" / "rank0.safetensors")
    other = load_file(tmp_path / "w2" / "rank1.safetensors")
    assert all(torch.equal(two[name], other[name]) for name in two), "ranks differ"
    worst = max(float((one[name] - two[name]).abs().max()) for name in one)
    # AdamW's first steps divide by |gradient|: rounding of tiny gradients is scaled to the rate.
    assert worst < 2e-4, f"largest weight difference {worst:.2e} at learning rate 1e-3"
    losses = [
        json.loads((tmp_path / f"w{world}" / "rank0.json").read_text())["logs"] for world in (1, 2)
    ]
    for name in losses[0]:
        if name.startswith("loss/"):
            assert losses[1][name] == pytest.approx(losses[0][name], rel=1e-4, abs=1e-7)
