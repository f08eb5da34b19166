"""A run that pauses, and is exported in between, is the run that does not."""

from __future__ import annotations

import pytest
from support.resume import differences, everything
from support.runs import build_trainer, teacher_dir


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:export. training stopped at update")
@pytest.mark.parametrize("case", ["dmd2", pytest.param("tscd", marks=pytest.mark.full)])
def test_pauses_and_exports_change_nothing(case, tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    options = {"max_train_steps": 4, "lr_scheduler": "cosine", "logging_steps": 3}
    options |= {"ema_decay": 0.9}
    whole = build_trainer(case, teacher, "lora", tmp_path / "whole", **options)
    whole.train()
    paused = build_trainer(case, teacher, "lora", tmp_path / "paused", **options)
    for step in (1, 2, 4):
        paused.train(until=step)
        assert paused.step == step
        paused.export(tmp_path / f"at_{step}")
    assert differences(everything(whole), everything(paused)) == []


def test_a_pause_is_saved_and_resumes_in_another_trainer(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd3", tmp_path_factory)
    whole = build_trainer("lcm", teacher, "full", tmp_path / "whole", max_train_steps=3)
    whole.train()
    build_trainer("lcm", teacher, "full", tmp_path / "cut", max_train_steps=3).train(until=2)
    again = build_trainer(
        "lcm", teacher, "full", tmp_path / "cut", max_train_steps=3, resume_from_checkpoint="latest"
    )
    again.train(until=9)  # past the end is the end
    assert again.step == 3
    assert differences(everything(whole), everything(again)) == []
