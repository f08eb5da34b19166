"""What is played back is what would have run, to the byte and the operation."""

from __future__ import annotations

from typing import Any

import pytest
from support.runs import teacher_dir

from stepdistill.config.run import RunConfig
from stepdistill.planning.forecast import _traced
from stepdistill.testing.tiny import TINY_FAMILY

DEFAULT = [("sd_v", "consistency", "lora", True), ("sd3", "dmd2", "full", False)]
FULL = [
    (family, method, layout, checkpointing)
    for family in ("sd", "sdxl", "flux", "qwen_image", "wan", "wan_i2v", "z_image", "dit")
    for method, layout, checkpointing in (
        ("dmd2", "lora", True),
        ("dmd2", "full", False),
    )
]


@pytest.mark.parametrize(
    ("family", "method", "layout", "checkpointing"),
    [*DEFAULT, *(pytest.param(*case, marks=pytest.mark.full) for case in FULL)],
)
def test_a_forecast_is_the_same_when_every_block_is_run(
    family: str, method: str, layout: str, checkpointing: bool, tmp_path_factory: Any
) -> None:
    guided = TINY_FAMILY[family].has_null
    options: dict[str, Any] = {"guidance": 3.0 if guided else 1.0} if method == "dmd2" else {}
    run = RunConfig(
        pretrained_model_name_or_path=str(teacher_dir(family, tmp_path_factory)),
        method=method,
        method_config=options,
        tuning={"student": layout, "fake": layout, "rank": 2},
        train_batch_size=2,
        gradient_checkpointing=checkpointing,
        mixed_precision="bf16" if checkpointing else "no",
        ema_decay=0.9,
    ).model_dump_json()
    assert _traced(run, True) == _traced(run, False)
