"""Scorers and decoders in a forecast: their weights, and what a gradient through them takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from rewards.test_clip import MODEL
from support.runs import learned_network, teacher_dir
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from stepdistill.config.run import RunConfig
from stepdistill.core.method import ScorerSpec
from stepdistill.families.registry import load_family
from stepdistill.planning.costs import Forecast
from stepdistill.planning.forecast import _traced, forecast
from stepdistill.planning.report import table
from stepdistill.rewards import SCORERS, build_scorers

BSZ = 4


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> dict[str, Any]:
    """A reward by a tiny CLIP, of which there is no weight."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL}))
    given = {"model": f"local-dir:{folder}", "pretrained": None}
    return {"kind": "clip", "weight": 1.0, "options": given}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return teacher_dir("sd3", tmp_path_factory)


def run_config(teacher: Path, **options: Any) -> RunConfig:
    given = {"method": "feedback", "method_config": {"anchor": 0.0}, "tuning": {"rank": 2}}
    given |= {"train_batch_size": BSZ, "validation_steps": 0}
    return RunConfig(pretrained_model_name_or_path=str(teacher), **{**given, **options})


def student(plan: Forecast) -> Any:
    return next(cost for cost in plan.phases if cost.phase == "student")


@pytest.mark.full
def test_scorer_and_decoder_are_held_and_computed(clip, teacher) -> None:
    """By as many operations as a pass through both takes: forward once, and back to the pixels."""
    run = run_config(teacher, rewards=[clip])
    plan, plain = forecast(run), forecast(run_config(teacher))
    net = open_clip.CLIP(**MODEL)
    family = load_family(teacher)
    weights = 4 * sum(p.numel() for p in net.parameters())
    vae = 4 * sum(p.numel() for p in family.pipeline.vae.parameters())
    assert plan.judges == weights + vae
    assert "scorers, and what decodes for them" in [*table(plan, run).columns[0].cells]
    assert plan.resident == plain.resident + weights
    offloaded = forecast(run.model_copy(update={"offload_encoders": True}))
    assert offloaded.resident == plan.resident - plan.encoders  # the VAE stays
    latents = torch.zeros(BSZ, *family.sample_shape(), requires_grad=True)
    family.pipeline.vae.requires_grad_(False)
    net.visual.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        pixels = nn.functional.interpolate(family.images(latents), (32, 32))
        net.visual(pixels).sum().backward()
    expected, more = counter.get_total_flops(), student(plan).flops - student(plain).flops
    assert expected < more < 1.5 * expected  # and the text, once, without a gradient


@pytest.mark.full
def test_a_crop_and_a_checkpointed_vae_take_less_memory(clip, teacher) -> None:
    plain, crop, recomputed = (
        student(forecast(run_config(teacher, rewards=[clip], **options)))
        for options in (
            {"gradient_checkpointing": False},
            {"gradient_checkpointing": False, "reward_crop": 2},
            {"gradient_checkpointing": True},
        )
    )
    assert crop.activations < plain.activations
    assert crop.flops < plain.flops
    assert recomputed.activations < plain.activations
    assert recomputed.flops > plain.flops


@pytest.mark.full
@pytest.mark.parametrize("decoder", [None, pytest.param("madebyollin/taesd3", id="small")])
def test_it_is_the_same_when_every_block_is_run(clip, decoder, teacher) -> None:
    options = {"gradient_checkpointing": decoder is None, "decoder": decoder}
    run = run_config(teacher, rewards=[clip], **options).model_dump_json()
    assert _traced(run, True) == _traced(run, False)


@pytest.mark.full
@pytest.mark.parametrize("family", ["wan", "sana"])
def test_other_decoders(family, clip, tmp_path_factory) -> None:
    """A video's hands a cache from block to block."""
    folder = teacher_dir(family, tmp_path_factory)
    run = run_config(folder, rewards=[clip], gradient_checkpointing=True)
    assert student(forecast(run)).flops > 0


@pytest.mark.full
def test_every_kind_has_a_skeleton(clip, caplog, tmp_path) -> None:
    options = {"clip": clip["options"], "aesthetic": {**clip["options"], "head": "none"}}
    options["features"] = {"network": str(learned_network(tmp_path))}
    with torch.device("meta"):
        for kind in SCORERS:
            spec = ScorerSpec(kind, options.get(kind, {}))
            (made,) = build_scorers({kind: spec}, {}, "meta", weights=False).values()
            assert isinstance(made, nn.Module)
            assert sum(p.numel() for p in made.parameters()) > 1000
    assert caplog.text == ""


@pytest.mark.full
def test_a_method_s_own_scorers_are_counted(tmp_path_factory) -> None:
    folder = teacher_dir("sd", tmp_path_factory)
    options = {"regression": "lpips"}
    plan = forecast(run_config(folder, method="dmd", method_config=options))
    assert round(plan.judges / 4e6) == 15  # VGG16's convolutions
