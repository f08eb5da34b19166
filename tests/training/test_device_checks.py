"""The checks of tests/gpu, on the CPU: what they measure, and that they see a difference."""

from __future__ import annotations

import pytest
import torch
from support.device_checks import fused_error, gradient_error, gradients, held_and_peak
from support.runs import teacher_dir

from stepdistill.config.run import RunConfig


def test_an_update_and_its_gradient(tmp_path, tmp_path_factory) -> None:
    """bf16's tolerance of tests/gpu holds here, and the loss of other draws lies outside it."""
    teacher = teacher_dir("sd3", tmp_path_factory)

    def update(name, **options):
        return gradients("cpu", "reflow", teacher, "lora", tmp_path / name, **options)

    loss, expected = update("plain")
    half_loss, half = update("half", mixed_precision="bf16")
    _, saved = update("saved", gradient_checkpointing=True)
    _, other = update("other", seed=1)
    assert half_loss == pytest.approx(loss, rel=3e-2)
    assert 0 < gradient_error(half, expected) < 0.1
    assert gradient_error(saved, expected) < 1e-5
    assert gradient_error(other, expected) > 0.3


def test_fused_adamw() -> None:
    assert fused_error("cpu") < 1e-6


@pytest.mark.full
def test_what_is_held_is_what_plan_says(tmp_path, tmp_path_factory) -> None:
    run = RunConfig(
        pretrained_model_name_or_path=str(teacher_dir("sd3", tmp_path_factory)),
        method="dmd2",
        method_config={"num_steps": 1, "critic_steps": 1},
        output_dir=str(tmp_path / "run"),
        tuning={"rank": 2},
        train_batch_size=1,
        max_train_steps=2,
        disable_progress_bar=True,
    )
    held, peak, plan = held_and_peak("cpu", run)
    assert peak is None
    assert held == pytest.approx(plan.resident, rel=0.02)


def test_errors_are_of_all_tensors_together() -> None:
    expected = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    error = gradient_error({"a": torch.tensor([3.5]), "b": expected["b"]}, expected)
    assert error == pytest.approx(0.1)
