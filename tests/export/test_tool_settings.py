"""Sampler, scheduler and shift of the cards, held against the tools' schedules and sigmas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from support.tools import SCHEDULERS, Sampling, a1111_lcm_sigmas

from stepdistill.core.path import FlowPath, VPPath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.times import uniform_grid
from stepdistill.export.tool_notes import tool_notes
from stepdistill.export.tool_rules import RULES
from stepdistill.export.tool_settings import tool_settings

VP_CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
VP = VPPath(DDIMScheduler(**VP_CONFIG).alphas_cumprod)


def settings(kind: str, spec: SamplerSpec, flow: bool = False, **scheduler: Any) -> dict[str, Any]:
    sd = kind in ("sd", "sd2", "sdxl")
    path = FlowPath() if flow or not sd else VP
    return tool_settings(RULES[kind], path, spec, {**VP_CONFIG, **scheduler}, sd)


def visited(kind: str, told: dict[str, Any], scheduler: str, steps: int) -> list[float]:
    """ComfyUI's sigmas for those settings, its own shift where no node stands."""
    rules, shift = RULES[kind], RULES[kind].shift
    table = "flow" if told["node"] and kind.startswith("sd") and kind != "sd3" else rules.table
    if told["node"] is not None and told["node"][0] != "ModelSamplingDiscrete":
        shift = told["node"][1][0]
    return SCHEDULERS[scheduler](Sampling(table, shift), steps)


# kind, the student's shift, the node that must stand in the graph
FLOWS = [
    ("sd3", 3.0, None),
    ("flux", math.exp(1.15), None),
    ("flux", math.exp(0.63), ["ModelSamplingFlux", [0.63, 0.63, 1024, 1024]]),
    ("lumina2", 6.0, None),
    ("z_image", 3.0, None),
    ("qwen_image", math.exp(0.9), ["ModelSamplingAuraFlow", [2.46]]),
    ("wan", 3.0, ["ModelSamplingSD3", [3.0]]),
    ("wan", 8.0, None),
]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("kind", "shift", "node"), FLOWS)
def test_simple_visits_the_trained_times_of_a_flow(kind, shift, node, steps) -> None:
    grid = uniform_grid(steps, shift)
    told = settings(kind, SamplerSpec(grid, "renoise"))["comfyui"]
    assert told["scheduler"] == "simple"
    assert told["sampler"] == ("lcm" if steps > 1 else "euler")
    if steps > 1:
        assert told["node"] == node
    sigmas = visited(kind, told, "simple", steps)
    torch.testing.assert_close(sigmas, list(grid), rtol=0, atol=5e-4)


@pytest.mark.parametrize("scheduler", sorted(set(SCHEDULERS) - {"simple"}))
@pytest.mark.parametrize(("kind", "shift", "node"), FLOWS)
def test_other_schedulers_visit_other_times(kind, shift, node, scheduler) -> None:
    grid = uniform_grid(4, shift)
    told = settings(kind, SamplerSpec(grid, "renoise"))["comfyui"]
    sigmas = visited(kind, told, scheduler, 4)
    # sgm_uniform comes within a training step or two, and no nearer at the end.
    assert max(abs(a - b) for a, b in zip(sigmas, grid, strict=False)) > 1e-4
    if scheduler != "sgm_uniform":
        assert max(abs(a - b) for a, b in zip(sigmas, grid, strict=False)) > 0.05


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_simple_visits_the_trained_times_of_a_table(kind) -> None:
    told = settings(kind, SamplerSpec(uniform_grid(4), "renoise"))["comfyui"]
    assert (told["sampler"], told["scheduler"], told["node"]) == ("lcm", "simple", None)
    sampling = Sampling("vp")
    trained = [sampling.sigmas[n] for n in (999, 749, 499, 249)]
    assert SCHEDULERS["simple"](sampling, 4) == trained
    manual = [float(text) for text in told["sigmas"].split(", ")]
    torch.testing.assert_close(manual, [*trained, 0.0], rtol=1e-5, atol=0)


def test_normal_visits_other_indices_of_a_table() -> None:
    sampling = Sampling("vp")
    indices = [sampling.time(s) for s in SCHEDULERS["normal"](sampling, 4)]
    assert indices == [999, 666, 333, 0]


def test_times_off_the_schedule_are_given_one_by_one() -> None:
    told = settings("sd3", SamplerSpec((0.9, 0.5, 0.1), "ode"))["comfyui"]
    assert told["scheduler"] is None
    assert told["node"] is None
    assert told["sigmas"] == "0.9, 0.5, 0.1, 0"
    notes = tool_notes({"tools": {"comfyui": told, "a1111": None}, "visited_model_times": (900.0,)})
    assert "no scheduler visits the trained times" in notes
    assert "`ManualSigmas`: `0.9, 0.5, 0.1, 0`" in notes


def test_sigmas_have_no_exponents() -> None:
    """ComfyUI takes a list apart by digits and dots: 1e-05 would be two numbers."""
    told = settings("sd3", SamplerSpec((1.0, 1e-5), "ode"))["comfyui"]
    assert told["sigmas"] == "1, 0.00001, 0"


def test_velocity_students_in_a_unet_need_a_flow_table() -> None:
    told = settings("sd", SamplerSpec(uniform_grid(4), "ode"), flow=True)["comfyui"]
    assert told["node"] == ["ModelSamplingSD3", [1.0]]
    assert told["scheduler"] == "simple"
    assert visited("sd", told, "simple", 4) == list(uniform_grid(4))


@pytest.mark.parametrize(
    ("prediction", "zero_snr"), [("v_prediction", False), ("v_prediction", True)]
)
def test_prediction_and_zero_snr_are_set_by_a_node(prediction, zero_snr) -> None:
    told = settings(
        "sd2",
        SamplerSpec(uniform_grid(4), "renoise"),
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_snr,
    )["comfyui"]
    assert told["node"] == ["ModelSamplingDiscrete", ["v_prediction", zero_snr]]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (SamplerSpec(uniform_grid(4), "tcd", gamma=0.3), "kind tcd"),
        (SamplerSpec(uniform_grid(4), "anchored"), "kind anchored"),
        (SamplerSpec(uniform_grid(4), "renoise", w=6.5), "tells a UNet the guidance"),
        (SamplerSpec((0.5, 0.001), "renoise", boundary_scale=10.0), "blends"),
        (SamplerSpec(uniform_grid(4), "ode", keeps_scheduler=True), "as its teacher is"),
    ],
)
def test_what_the_tools_cannot_do_is_said(spec, said) -> None:
    told = settings("sd", spec)
    assert said in told["why"]
    assert said in tool_notes({"tools": told})


def test_another_noise_table_is_said() -> None:
    told = settings("sd", SamplerSpec(uniform_grid(4), "renoise"), beta_schedule="linear")
    assert "one noise table" in told["why"]


@pytest.mark.parametrize(("gamma", "sampler"), [(0.0, "euler"), (1.0, "lcm")])
def test_both_ends_of_tcd_have_a_sampler(gamma, sampler) -> None:
    told = settings("sd", SamplerSpec(uniform_grid(4), "tcd", gamma=gamma))["comfyui"]
    assert told["sampler"] == sampler


def test_a1111_visits_one_time_in_twenty_with_its_lcm() -> None:
    """999, 759, 499, 259 where the student was trained at 999, 749, 499, 249: the card says so."""
    made = settings("sd", SamplerSpec(uniform_grid(4), "renoise"))
    assert made["a1111"]["visits"] == a1111_lcm_sigmas(4) == [999, 759, 499, 259]
    visited_times = (999, 749, 499, 249)
    notes = tool_notes({"tools": made, "visited_model_times": visited_times})
    assert "A1111: sampler `LCM`, scheduler `Simple`, steps 4, cfg 1; that visits 999, 759" in notes
    euler = settings("sd", SamplerSpec(uniform_grid(4), "ode"))["a1111"]
    assert (euler["sampler"], euler["visits"]) == ("Euler", [999, 749, 499, 249])


@pytest.mark.parametrize("kind", ["flux", "lumina2", "z_image", "qwen_image", "wan"])
def test_a1111_has_no_settings_for_what_it_does_not_load(kind) -> None:
    assert settings(kind, SamplerSpec(uniform_grid(4, 3.0), "renoise"))["a1111"] is None
