"""The methods' options at their limits: what is just allowed, and what just is not."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, VPPath
from stepdistill.methods.consistency_config import ConsistencyConfig, GridGrowth
from stepdistill.methods.ctm_config import CTMConfig
from stepdistill.methods.dmd import DMDConfig
from stepdistill.methods.f_distill import FDistillConfig
from stepdistill.methods.lora_guidance_config import LoRAGuidanceConfig
from stepdistill.methods.meanflow import SCM
from stepdistill.methods.meanflow_config import MeanFlowConfig
from stepdistill.methods.pcm import PCMConfig
from stepdistill.methods.reflow_config import ReflowConfig
from stepdistill.methods.rfpp import RFPP, RFPPConfig
from stepdistill.methods.scores_config import ScoreConfig
from stepdistill.methods.slimflow import SlimFlow
from stepdistill.methods.slimflow_config import SlimFlowConfig
from stepdistill.methods.stages import check_stage_starts, stage_at, stage_begins
from stepdistill.methods.tscd_config import TSCDConfig
from stepdistill.methods.vsd import VSDConfig

EMBEDDED = {"embed_guidance": True, "guidance_range": (2.0, 8.0)}
GAN = {"gan": {"weight_g": 1.0}}
TOLD = {"end_input": True, "guidance_range": (1.0, 1.0)}

ALLOWED: list[tuple[Any, dict[str, Any]]] = [
    (ConsistencyConfig, {"guidance_range": (0.0, 0.0)}),
    (ConsistencyConfig, {"guidance_range": (0.0, 2.0)}),
    (ConsistencyConfig, {"num_grid": 4, "num_steps": 4, "growth": {"start": 4, "steps": 9}}),
    (ConsistencyConfig, {**EMBEDDED, "inference_guidance": 2.0}),
    (ConsistencyConfig, {**EMBEDDED, "inference_guidance": 8.0}),
    (CTMConfig, {"num_grid": 4, "solver_steps": 4, "num_steps": 4}),
    (CTMConfig, {**TOLD, "denoising": 1e-3, "bootstrap": True, "solver_steps": 1}),
    (DMDConfig, {"num_steps": 1}),
    (FDistillConfig, {"ratio_clip": (0.5, 0.6)}),
    (LoRAGuidanceConfig, {**EMBEDDED, "guidance": 2.0}),
    (LoRAGuidanceConfig, {**EMBEDDED, "guidance": 8.0}),
    (LoRAGuidanceConfig, {"embed_guidance": True, "guidance_range": (0.0, 8.0)}),
    (LoRAGuidanceConfig, {**EMBEDDED, "guidance_range": (0.5, 8.0), "guidance": 1.0}),
    (LoRAGuidanceConfig, {"num_steps": (2, 1), "stage_rates": (1.0, 0.1, 0.1)}),
    (MeanFlowConfig, {"h": 5e-3, "norm_power": 0.0, "same_share": 0.0}),
    (MeanFlowConfig, {"h": 0.5, "norm_power": 2.0, "alpha": 1.0}),
    (MeanFlowConfig, {**SCM, "matching": 1.0, "critic_steps": 1, "dm_t_range": (0.0, 1.0)}),
    (PCMConfig, {"sampler": "renoise", "num_phases": 1, "num_steps": 40}),
    (PCMConfig, {"guidance_range": (0.0, 0.0)}),
    (PCMConfig, {"guidance_range": (1.0, 1.0), "inference_guidance": 3.0}),
    (ReflowConfig, {"t_range": (0.5, 1.0)}),
    (ReflowConfig, {"stage": "distill", "student_times": (1.0,), "loss": "lpips"}),
    (ReflowConfig, {"stage": "distill", "student_times": (1.0, 0.25)}),
    (RFPPConfig, {"t_range": (0.5, 1.0)}),
    (ScoreConfig, {"dm_t_range": (0.0, 1.0)}),
    (ScoreConfig, {"student_times": (0.4,), "rollout": "pure_noise"}),
    (ScoreConfig, {"student_times": (1.0, 0.5), "num_steps": 2}),
    (SlimFlowConfig, {"stage": "distill", "guide_range": (0.2, 0.9)}),
    (TSCDConfig, {"segments": (1,)}),
    (TSCDConfig, {"segments": (4, 2), "num_steps": 6}),
    (TSCDConfig, {"segments": (2, 1), "loss_scale": (1.0, 0.0), **GAN}),
    (VSDConfig, {"guidance_range": (0.0, 0.5)}),
]

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (ConsistencyConfig, {"guidance_range": (-0.5, 2.0)}, "guidance_range"),
    (ConsistencyConfig, {"guidance_range": (3.0, 2.0)}, "guidance_range"),
    (ConsistencyConfig, {"num_grid": 4, "growth": {"start": 5, "steps": 9}}, "growth.start"),
    (ConsistencyConfig, {"num_grid": 3, "num_steps": 4}, "num_steps"),
    (ConsistencyConfig, {**EMBEDDED, "inference_guidance": 1.9}, "inference_guidance"),
    (ConsistencyConfig, {**EMBEDDED, "inference_guidance": 8.1}, "inference_guidance"),
    (CTMConfig, {"num_grid": 4, "solver_steps": 5}, "solver_steps"),
    (CTMConfig, {"num_grid": 4, "solver_steps": 4, "num_steps": 5}, "num_steps"),
    (CTMConfig, {"denoising": 1e-3, "guidance_range": (1.0, 1.0)}, "without end_input"),
    (CTMConfig, {**TOLD, "denoising": 1e-3, "guidance_range": (1.0, 1.1)}, "not guided"),
    (CTMConfig, {**TOLD, "bootstrap": True}, "Set denoising"),
    (DMDConfig, {"num_steps": 2}, "one step"),
    (DMDConfig, {"student_times": (1.0, 0.5)}, "one step"),
    (FDistillConfig, {"ratio_clip": (0.5, 0.5)}, "ratio_clip"),
    (FDistillConfig, {"ratio_clip": (0.0, 0.5)}, "ratio_clip"),
    (FDistillConfig, {"gan": {"weight_g": 1.0, "weight_d": 0.0}}, "weight_d"),
    (LoRAGuidanceConfig, {**EMBEDDED, "guidance": 1.9}, "guidance"),
    (LoRAGuidanceConfig, {**EMBEDDED, "guidance": 8.1}, "guidance"),
    (LoRAGuidanceConfig, {"embed_guidance": True, "guidance_range": (7.5, 7.5)}, "guidance_range"),
    (LoRAGuidanceConfig, {"embed_guidance": True, "guidance_range": (-1.0, 9.0)}, "low < high"),
    (LoRAGuidanceConfig, {"embed_guidance": True}, "exactly with embed_guidance"),
    (LoRAGuidanceConfig, {"num_steps": (4, 3)}, "halve"),
    (LoRAGuidanceConfig, {"num_steps": (0,)}, "halve"),
    (LoRAGuidanceConfig, {"num_steps": (4,), "stage_rates": (1.0, 0.0)}, "stage_rates"),
    (LoRAGuidanceConfig, {"num_steps": (4,), "stage_rates": (1.0,)}, "stage_rates"),
    (MeanFlowConfig, {"h": 0.0049}, "h"),
    (MeanFlowConfig, {"h": 0.51}, "h"),
    (MeanFlowConfig, {"alpha": 0.0049}, "alpha"),
    (MeanFlowConfig, {"alpha": 1.01}, "alpha"),
    (MeanFlowConfig, {"norm_power": 2.01}, "norm_power"),
    (MeanFlowConfig, {"same_share": 1.0}, "same_share"),
    (MeanFlowConfig, {"r": "general", "matching": 1e-3}, "expected 0 with r general"),
    (ConsistencyConfig, {"shrink": {"q": 1.0}}, "q"),
    (ConsistencyConfig, {"shrink": {"max_ratio": 1.0}}, "max_ratio"),
    (ConsistencyConfig, {"shrink": {"boundary_share": 1.0}}, "boundary_share"),
    (PCMConfig, {"sampler": "renoise", "num_phases": 1, "num_steps": 41}, "num_steps"),
    (PCMConfig, {"sampler": "renoise", "num_phases": 2}, "num_phases 1"),
    (PCMConfig, {"num_phases": 4, "num_steps": 2}, "the number of phases"),
    (PCMConfig, {"guidance_range": (-1.0, 2.0)}, "guidance_range"),
    (PCMConfig, {"guidance_range": (3.0, 2.0)}, "guidance_range"),
    (PCMConfig, {"guidance_range": (1.0, 2.0), "inference_guidance": 3.0}, "count twice"),
    (ReflowConfig, {"t_range": (0.0, 1.0)}, "t_range"),
    (ReflowConfig, {"t_range": (0.5, 0.5)}, "t_range"),
    (ReflowConfig, {"t_range": (0.5, 1.1)}, "t_range"),
    (ReflowConfig, {"stage": "distill", "student_times": (0.5, 0.5)}, "student_times"),
    (ReflowConfig, {"stage": "distill", "student_times": (1.1,)}, "student_times"),
    (ReflowConfig, {"stage": "distill", "student_times": (0.5, 0.0)}, "student_times"),
    (ReflowConfig, {"stage": "distill", "student_times": ()}, "student_times"),
    (ReflowConfig, {"student_times": (1.0,)}, "student_times"),
    (ReflowConfig, {"stage": "distill", "num_steps": 2, "loss": "lpips"}, "one trained time"),
    (RFPPConfig, {"t_range": (0.5, 0.5)}, "t_range"),
    (RFPPConfig, {"t_range": (0.0, 0.5)}, "t_range"),
    (RFPPConfig, {"t_range": (0.5, 1.1)}, "t_range"),
    (ScoreConfig, {"dm_t_range": (0.5, 0.5)}, "time range"),
    (ScoreConfig, {"dm_t_range": (-0.1, 0.5)}, "time range"),
    (ScoreConfig, {"dm_t_range": (0.5, 1.1)}, "time range"),
    (ScoreConfig, {"student_times": (0.5, 0.5)}, "student_times"),
    (ScoreConfig, {"student_times": (1.1, 0.5)}, "student_times"),
    (ScoreConfig, {"student_times": (1.0, 0.0)}, "student_times"),
    (ScoreConfig, {"num_steps": 2, "rollout": "pure_noise"}, "rollout"),
    (SlimFlowConfig, {"guide_range": (0.0, 0.5)}, "guide_range"),
    (SlimFlowConfig, {"guide_range": (0.5, 0.5)}, "guide_range"),
    (SlimFlowConfig, {"guide_range": (0.2, 0.8), "start_time": 0.8}, "guide_range"),
    (SlimFlowConfig, {"stage": "distill", "num_steps": 2}, "expected 1 and no student_times"),
    (TSCDConfig, {"segments": (2, 2)}, "segments"),
    (TSCDConfig, {"segments": (5, 2)}, "segments"),
    (TSCDConfig, {"segments": (2, 0)}, "segments"),
    (TSCDConfig, {"segments": (2, 1), "loss_scale": (1.0, -0.1)}, "loss_scale"),
    (TSCDConfig, {"segments": (2, 1), "loss_scale": (1.0,)}, "loss_scale"),
    (TSCDConfig, {"segments": (2, 1), "loss_scale": (1.0, 0.0)}, "train on nothing"),
    (TSCDConfig, {"segments": (4, 2), "num_steps": 5}, "num_steps"),
    (VSDConfig, {"guidance_range": (2.0, 2.0)}, "guidance_range"),
    (VSDConfig, {"guidance_range": (-0.5, 2.0)}, "guidance_range"),
]


def test_the_last_value_inside_each_limit_is_taken_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for config, options in ALLOWED:
            config(**options)


@pytest.mark.parametrize(("config", "options", "message"), REFUSED)
def test_the_first_value_beyond_each_limit_is_refused(config, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


# ------------------------------------------------------------------------------------- schedules
@pytest.mark.parametrize("starts", [(1, 2), (1.0, 7.0), (0.1, 0.9), None])
def test_starts_that_begin_three_stages(starts) -> None:
    check_stage_starts(starts, 3)


@pytest.mark.parametrize(
    "starts", [(0.0, 0.5), (0.5, 1), (3, 3), (0.5, 0.5), (2, 1), (1.5, 2), (1,), (1, 2, 3)]
)
def test_starts_that_do_not_begin_three_stages(starts) -> None:
    with pytest.raises(ValueError, match="stage_starts: expected 2 rising numbers"):
        check_stage_starts(starts, 3)


def test_stages_begin_at_whole_steps_and_a_fraction_s_first_one() -> None:
    assert stage_begins(3, (1, 5), 10) == (0, 1, 5)
    assert stage_begins(3, (0.1, 0.55), 30) == (0, 3, 17)
    assert stage_begins(4, None, 10) == (0, 3, 5, 8)
    assert [stage_at(step, (0, 3, 5)) for step in (0, 2, 3, 4, 5, 9)] == [0, 0, 1, 1, 2, 2]
    for starts, max_steps in (((1,), 1), ((4,), 4)):
        with pytest.raises(ValueError, match="below max_train_steps"):
            stage_begins(2, starts, max_steps)


def test_consistency_training_s_grid_grows_by_the_paper_s_law() -> None:
    growth = GridGrowth(start=5, steps=100)
    assert [growth.intervals(step, 50) for step in (0, 50, 100, 300)] == [4, 36, 50, 50]
    config = ConsistencyConfig(num_grid=50, growth=growth, ema_decay=0.9)
    expected = [math.exp(5 * math.log(0.9) / n) for n in (4, 36, 50)]
    assert [config.target_decay(step) for step in (0, 50, 100)] == pytest.approx(expected)


def test_learning_rates_fall_within_each_stage() -> None:
    options = {"num_steps": (2, 1), "stage_starts": (4, 6), "stage_rates": (1.0, 0.5, 0.2)}
    flat, falling = (LoRAGuidanceConfig(**options, anneal=anneal) for anneal in (False, True))
    steps = (0, 3, 4, 5, 6, 8)
    assert [flat.rate_scale(step, 10) for step in steps] == [1.0, 1.0, 0.5, 0.5, 0.2, 0.2]
    expected = [1.0, 0.25, 0.5, 0.25, 0.2, 0.1]
    assert [falling.rate_scale(step, 10) for step in steps] == pytest.approx(expected)


def test_a_stage_s_weights_are_its_factors() -> None:
    config = TSCDConfig(
        segments=(2, 1), loss_scale=(0.5, 2.0), gan_scale=(0.0, 3.0), gan={"weight_g": 0.25}
    )
    assert [config.weights(stage) for stage in (0, 1)] == [(0.5, 0.0), (2.0, 0.75)]


def test_what_hangs_on_a_switch_of_rfpp_and_slimflow() -> None:
    setting = Setting(VPPath.from_betas(torch.full((10,), 0.1)), "eps")
    raw, wrapped = (RFPP(RFPPConfig(setup=s, heun=True), setting) for s in ("raw", "wrapped"))
    assert isinstance(raw.path, FlowPath)
    assert wrapped.path is setting.path
    assert [m.roles()["student"].as_flow for m in (raw, wrapped)] == [True, False]
    assert [wrapped.sampler(n).heun for n in (1, 2)] == [False, True]
    weights = [SlimFlowConfig(stage="distill", guide_weight=w) for w in (0.0, 0.5)]
    assert ["teacher" in SlimFlow(c, setting).roles() for c in weights] == [False, True]
