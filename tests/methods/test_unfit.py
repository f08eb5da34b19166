"""Options of a file or recipe that a model can't have, and what it gets in their place."""

from __future__ import annotations

from typing import Any

import pytest

from stepdistill.core.abilities import Abilities
from stepdistill.core.path import FlowPath, VEPath
from stepdistill.methods.consistency_config import ConsistencyConfig
from stepdistill.methods.lora_guidance_config import LoRAGuidanceConfig
from stepdistill.methods.reflow_config import ReflowConfig

TOLD, UNTOLD = Abilities(FlowPath()), Abilities(FlowPath(), told_guidance=False)
EDM = Abilities(VEPath())


def made(cls: Any, options: dict[str, Any], model: Abilities) -> dict[str, Any]:
    return {name: value for name, (value, _) in cls.unfit(options, model).items()}


@pytest.mark.parametrize(
    ("options", "model", "expected"),
    [
        ({"guidance_range": (4.0, 6.0)}, UNTOLD, {}),  # nothing is told
        ({"inference_guidance": 5.0}, TOLD, {}),
        ({"inference_guidance": 4.0}, TOLD, {}),  # either end is learned
        ({"inference_guidance": 6.0}, TOLD, {}),
        ({"inference_guidance": 3.0}, TOLD, {"inference_guidance": 4.0}),
        ({"inference_guidance": 7.0}, TOLD, {"inference_guidance": 6.0}),
        ({"inference_guidance": 5.0}, UNTOLD, {"embed_guidance": False}),
    ],
)
def test_guidance_told_is_one_that_the_embedding_learns(options, model, expected) -> None:
    told = {"embed_guidance": True, "guidance_range": (4.0, 6.0)}
    given = {**told, **options} if "inference_guidance" in options else options
    assert made(ConsistencyConfig, given, model) == expected


@pytest.mark.parametrize(
    ("options", "left_out"),
    [
        ({"guidance": 1.0}, True),
        ({"guidance": 3.0}, False),
        ({"guidance": 1.0, "embed_guidance": True}, False),
        ({"guidance": 1.0, "guidance_stage": False}, False),
        ({"guidance": 1.0, "num_steps": None}, False),
    ],
)
def test_a_stage_of_guidance_needs_some(options, left_out) -> None:
    given = {"guidance_stage": True, "num_steps": 4, "stage_rates": [1e-4, 1e-5], **options}
    expected = {"guidance_stage": False, "stage_rates": None}
    assert made(LoRAGuidanceConfig, given, TOLD) == (expected if left_out else {})


@pytest.mark.parametrize(
    ("options", "model", "expected"),
    [
        ({"setup": "raw", "num_steps": 99}, TOLD, {}),
        ({"setup": "raw"}, EDM, {"setup": "wrapped"}),
        ({"setup": "wrapped"}, EDM, {}),
        ({"num_steps": 10}, EDM, {"num_steps": 9}),
        ({"num_steps": 9}, EDM, {}),  # tests/core/test_times.py: no two fall on one
        ({"num_steps": 10, "stage": "distill"}, EDM, {}),  # its one step is trained
    ],
)
def test_an_edm_model_s_reflow_is_wrapped_and_takes_steps_that_differ(
    options, model, expected
) -> None:
    assert made(ReflowConfig, options, model) == expected
