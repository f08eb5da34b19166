"""Exact R1 on real networks: where it can't run, it says so."""

from __future__ import annotations

import pytest
from support.runs import build_trainer, teacher_dir


@pytest.mark.sampled("sd3")
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_checkpointed_attention_is_refused_with_what_to_do(family, tmp_path, tmp_path_factory):
    teacher = teacher_dir(family, tmp_path_factory)
    trainer = build_trainer("dmd2_r1", teacher, "lora", tmp_path, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"gan\.r1: expected no gradient_checkpointing"):
        trainer.train()
