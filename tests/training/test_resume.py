"""A run cut off at a random update and resumed is the uninterrupted one, to the last bit.

tests/benchmarks/resume.py does the same for every method and family.
"""

from __future__ import annotations

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from support.resume import cut_off, differences, everything, resumed_differs
from support.runs import build_trainer, teacher_dir


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("case", ["f_distill", "tscd_gan", "progressive", "cd"])
def test_a_run_cut_off_anywhere(case, workers, tmp_path, tmp_path_factory) -> None:
    """Ratio bins, segments and heads, stages, an averaged target; data from workers."""
    teacher = teacher_dir("sd", tmp_path_factory)
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": 2}
    differ, update, total = resumed_differs(case, teacher, "lora", tmp_path, **options)
    assert not differ, f"cut off at update {update} of {total}: {differ[:5]}"


def scaled(teacher, folder, **options):
    """A trainer with a gradient scaler that doubles every two updates, in float32.

    Accelerate makes one for fp16 on CUDA alone; what is saved and restored is the same.
    """
    trainer = build_trainer(
        "lcm", teacher, "lora", folder, max_train_steps=4, checkpointing_steps=1, **options
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    bare = trainer.optimizer.optimizer
    trainer.accelerator.scaler = scaler
    trainer.optimizer = AcceleratedOptimizer(bare, scaler=scaler)
    trainer.accelerator.unscale_gradients = lambda _optimizer: scaler.unscale_(bare)
    return trainer


def test_the_gradient_scaler_goes_on_where_it_was(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd_v", tmp_path_factory)
    whole = scaled(teacher, tmp_path / "whole")
    whole.train()
    assert whole.accelerator.scaler.get_scale() == 32.0  # 8, doubled after updates 2 and 4
    cut_off(scaled(teacher, tmp_path / "cut"), 3)
    again = scaled(teacher, tmp_path / "cut", resume_from_checkpoint="latest")
    again.train()
    assert differences(everything(whole), everything(again)) == []
