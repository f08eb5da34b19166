"""AdamW in 8 bits: its state through checkpoints, its bytes, its steps beside full precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.runs import TinyData, fingerprint, teacher_dir

from stepdistill import DistributionMatchingTrainer, TrainConfig, Tuning
from stepdistill.config.run import RunConfig
from stepdistill.loading.stored_tensors import StoredTensors
from stepdistill.planning.forecast import forecast
from stepdistill.training.checkpoint import load_optimizer_state

pytest.importorskip("bitsandbytes", reason="8-bit optimisers need bitsandbytes")
pytestmark = pytest.mark.quantization
RANK = 128  # from 4,096 numbers on a moment is held in 8 bits


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_dir("dit", tmp_path_factory)


def run(
    teacher: Path, out: Path, steps: int, optimizer: str = "adamw_8bit", **options: Any
) -> DistributionMatchingTrainer:
    args = TrainConfig(
        output_dir=str(out),
        max_train_steps=steps,
        train_batch_size=2,
        learning_rate=1e-3,
        checkpointing_steps=2,
        disable_progress_bar=True,
        optimizer=optimizer,  # type: ignore[arg-type]
        tuning=Tuning(rank=RANK),
        **options,
    )
    config = {"num_steps": 1, "critic_steps": 1, "guidance": 1.0}
    made = DistributionMatchingTrainer(
        teacher, args, TinyData((4, 8, 8), "label", ()), "dmd2", config
    )
    made.train()
    return made


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> DistributionMatchingTrainer:
    return run(teacher, tmp_path_factory.mktemp("whole"), 4)


def state_bytes(made: DistributionMatchingTrainer) -> int:
    """Of the moments and their scales, without the shared tables."""
    names = ("state1", "state2", "absmax1", "absmax2")
    states = made.optimizer.state.values()
    return sum(v.nbytes for state in states for k, v in state.items() if k in names)


def test_a_resumed_run_is_the_run_that_never_stopped(
    whole: DistributionMatchingTrainer, teacher: Path, tmp_path: Path
) -> None:
    run(teacher, tmp_path, 2)
    again = run(teacher, tmp_path, 4, resume_from_checkpoint="latest")
    for role in ("student", "fake"):
        here = fingerprint(again.bank.role_state(role))
        assert here == fingerprint(whole.bank.role_state(role)), role


def test_moments_are_held_in_8_bits(whole: DistributionMatchingTrainer) -> None:
    states = whole.optimizer.state
    large = [s for p, s in states.items() if p.numel() >= 4096]
    assert large
    assert {s["state1"].dtype for s in large} == {torch.uint8}


def test_the_forecast_knows_their_bytes(whole: DistributionMatchingTrainer, teacher: Path) -> None:
    plan = forecast(
        RunConfig(
            pretrained_model_name_or_path=str(teacher),
            method="dmd2",
            method_config={"num_steps": 1, "guidance": 1.0},
            optimizer="adamw_8bit",
            tuning=Tuning(rank=RANK),
        )
    )
    assert plan.optimizer == state_bytes(whole)


def test_steps_are_those_of_full_precision_but_for_rounding(
    whole: DistributionMatchingTrainer, teacher: Path, tmp_path: Path
) -> None:
    exact = run(teacher, tmp_path, 4, "adamw")
    ours, theirs = whole.bank.members("student"), exact.bank.members("student")
    moved = torch.cat([theirs[n].flatten() for n in theirs if "lora_B" in n])
    gap = torch.cat([(ours[n] - theirs[n]).flatten() for n in theirs if "lora_B" in n])
    assert float(gap.norm() / moved.norm()) < 0.05


def test_scales_of_another_size_are_refused(
    whole: DistributionMatchingTrainer, tmp_path: Path
) -> None:
    name = next(n for n, p in whole.bank.members("student").items() if p.numel() >= 4096)
    save_file({f"student/{name}/absmax1": torch.zeros(3)}, tmp_path / "wrong.safetensors")
    wrong = StoredTensors(tmp_path / "wrong")
    with pytest.raises(ValueError, match=r"absmax1 of \(\d+,\), got \(3,\)"):
        load_optimizer_state(whole.bank, whole.optimizer, wrong, {})
