"""Scorers and decoders in a forecast: their weights, and what a gradient through them takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from rewards.test_clip import MODEL
from support.runs import teacher_dir
from torch import nn

from stepdistill.config.run import RunConfig
from stepdistill.core.method import ScorerSpec
from stepdistill.families.registry import load_family
from stepdistill.planning.forecast import Forecast, _traced, forecast
from stepdistill.planning.report import table
from stepdistill.rewards import SCORERS, build_scorers
from stepdistill.testing.tiny import TINY


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> dict[str, Any]:
    """A reward by a tiny CLIP, of which there is no weight."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    told = {"model": f"local-dir:{folder}", "pretrained": None}
    return {"kind": "clip", "weight": 1.0, "options": told}


def run_config(tmp_path_factory: Any, **options: Any) -> RunConfig:
    return RunConfig(
        pretrained_model_name_or_path=str(teacher_dir("sd", tmp_path_factory)),
        **{"method": "feedback", "tuning": {"rank": 2}, "train_batch_size": 4, **options},
    )


def student(plan: Forecast) -> Any:
    return next(cost for cost in plan.phases if cost.phase == "student")


def test_weights_of_scorers_are_held(clip, tmp_path_factory) -> None:
    run = run_config(tmp_path_factory, rewards=[clip])
    plan = forecast(run)
    net = open_clip.CLIP(**MODEL)
    assert plan.judges == 4 * sum(p.numel() for p in net.parameters())
    text = "".join(str(cell) for cell in table(plan, run).columns[0].cells)
    assert "scorers and small decoder" in text
    assert plan.peak >= plan.resident > plan.judges


def test_decoder_and_scorer_are_computed_on_top(clip, tmp_path_factory) -> None:
    """By as many operations as a pass through both takes: forward once, and back to the pixels."""
    plans = [
        forecast(run_config(tmp_path_factory, method="dmd2", rewards=rewards))
        for rewards in ([], [clip])
    ]
    fake = [next(c for c in plan.phases if c.phase == "fake") for plan in plans]
    assert fake[0] == fake[1]
    more = student(plans[1]).flops - student(plans[0]).flops
    family = load_family(teacher_dir("sd", tmp_path_factory))
    from torch.utils.flop_counter import FlopCounterMode

    vae = family.pipeline.vae.requires_grad_(False)
    latents = torch.zeros(4, *family.sample_shape(), requires_grad=True)
    tower = open_clip.CLIP(**MODEL).visual.requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with counter:
        pixels = nn.functional.interpolate(vae.decode(latents).sample, (32, 32))
        tower(pixels).sum().backward()
    expected = counter.get_total_flops()
    assert expected < more < 1.2 * expected  # and the text, once


def test_a_crop_and_a_small_decoder_take_less(clip, tmp_path_factory) -> None:
    plain, small, crop = (
        student(forecast(run_config(tmp_path_factory, rewards=[clip], **options)))
        for options in ({}, {"decoder": "madebyollin/taesd"}, {"reward_crop": 2})
    )
    assert crop.activations < plain.activations
    assert crop.flops < plain.flops
    assert small.flops != plain.flops


def test_a_checkpointed_vae_takes_less_memory_and_more_operations(clip, tmp_path_factory) -> None:
    kept, recomputed = (
        student(
            forecast(
                run_config(
                    tmp_path_factory, rewards=[clip], gradient_checkpointing=on, train_batch_size=16
                )
            )
        )
        for on in (False, True)
    )
    assert recomputed.activations < kept.activations
    assert recomputed.flops > kept.flops


@pytest.mark.parametrize("checkpointing", [True, False])
def test_it_is_the_same_when_every_block_is_run(clip, checkpointing, tmp_path_factory) -> None:
    run = run_config(
        tmp_path_factory, rewards=[clip], gradient_checkpointing=checkpointing
    ).model_dump_json()
    assert _traced(run, True) == _traced(run, False)


@pytest.mark.parametrize("family", [name for name in ("sd3", "wan", "sana") if name in TINY])
def test_other_decoders(family, clip, tmp_path_factory) -> None:
    """A video's, too, which keeps a cache among its blocks."""
    run = RunConfig(
        pretrained_model_name_or_path=str(teacher_dir(family, tmp_path_factory)),
        method="feedback",
        rewards=[clip],
        gradient_checkpointing=True,
    )
    assert student(forecast(run)).flops > 0


def test_every_kind_has_a_skeleton(clip, tmp_path: Path) -> None:
    options = {"clip": clip["options"], "aesthetic": {**clip["options"], "head": "none"}}
    with torch.device("meta"):
        for kind in SCORERS:
            spec = ScorerSpec(kind, options.get(kind, {}))
            (made,) = build_scorers({kind: spec}, {}, "meta", weights=False).values()
            assert isinstance(made, nn.Module)
            assert sum(p.numel() for p in made.parameters()) > 1000


def test_a_method_s_own_scorers_are_counted(tmp_path_factory) -> None:
    options = {"regression": "lpips"}
    plan = forecast(run_config(tmp_path_factory, method="dmd", method_config=options))
    assert round(plan.judges / 4e6) == 15  # VGG16's convolutions
