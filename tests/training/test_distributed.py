"""Two and three gloo processes equal one with the same global batch, and each other bit for bit.

The GAN case is the mixed graph: the student's gradient flows through the fake's adapter on the
same base. Accumulation is 2, EMA is on, AdamW is the optimiser. Largest gradient difference
relative to the role's largest gradient; AdamW's first steps divide by |gradient|, so weights of
tiny gradients differ by up to the learning rate (1e-3) times the roundings' part of them.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.distributed import Job, alone, equal, gradient_error, largest, together
from support.runs import build_trainer, teacher_dir

GRADIENTS, WEIGHTS = 2e-4, 2e-4


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(out folder, the job, one process, by wrapping what two processes saw), run once."""
    out = tmp_path_factory.mktemp("two")
    teacher = teacher_dir("sd_v", tmp_path_factory)
    jobs = [Job("dmd2_gan", "lora", wrapping) for wrapping in ("ddp", "fsdp2")]
    seen = dict(zip(("ddp", "fsdp2"), together(2, jobs, {"sd_v": teacher}, out), strict=True))
    return out, teacher, alone(jobs[0], teacher, out), seen


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp2"])
def test_two_processes_equal_one(two, wrapping) -> None:
    _, _, one, seen = two
    first, second = seen[wrapping]
    assert [s.facts["world_size"] for s in (first, second)] == [2, 2]
    assert first.facts["sharded"] == (wrapping == "fsdp2")
    assert equal(first, second), "ranks differ"
    assert gradient_error(one, first) < GRADIENTS
    assert largest(one.weights, first.weights) < WEIGHTS
    for name, loss in one.facts["logs"].items():
        if name.startswith("loss/"):
            assert first.facts["logs"][name] == pytest.approx(loss, rel=1e-4, abs=1e-7)


def test_each_process_holds_its_part_alone(two) -> None:
    _, _, _, seen = two
    whole, parts = seen["ddp"][0].facts["bytes"], [s.facts["bytes"] for s in seen["fsdp2"]]
    assert sum(parts) == whole
    assert max(parts) < 0.55 * whole


def test_a_checkpoint_of_two_loads_on_one(two, tmp_path) -> None:
    out, teacher, _, seen = two
    first = seen["fsdp2"][0]
    trainer = build_trainer("dmd2_gan", teacher, "lora", tmp_path, ema_decay=0.9)
    trainer.restore(next(out.glob("*-fsdp2")) / "checkpoint-2")
    for role in ("student", "fake", "disc", "ema"):
        for name, value in trainer.bank.role_state(role).items():
            assert torch.equal(value, first.weights[f"{role}/{name}"])
