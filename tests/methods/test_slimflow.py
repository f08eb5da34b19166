"""SlimFlow: annealed noise, mirrored pairs, and the teacher's two steps, in closed form."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import yaml
from methods.test_reflow import FLOW, MU, PATHS, VP, Ctx64, Straight, pairs, pure_noise_rows
from methods.test_reflow import make as reflow

from stepdistill.config.run import RunConfig
from stepdistill.core.method import Setting
from stepdistill.methods.slimflow import SlimFlow
from stepdistill.methods.slimflow_config import SlimFlowConfig
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"


def make(path=FLOW, **options) -> SlimFlow:
    return SlimFlow(SlimFlowConfig(**options), Setting(path))


def loss_of(method, data, student, teacher=None, seed=1, step=0):
    (phase,) = method.phases(step)
    nets = AnalyticNets({"student": student, "teacher": teacher or student})
    return phase.loss(nets, data, Ctx64(seed=seed, step=step)).total


# ------------------------------------------------------------------------------ annealing reflow
def test_b_falls_from_one_to_zero():
    linear = make(anneal_steps=100)
    assert [linear.annealing(k) for k in (0, 25, 100, 500)] == [1.0, 0.75, 0.0, 0.0]
    cos = make(anneal="cos", anneal_steps=100)
    assert cos.annealing(0) == 1.0
    assert cos.annealing(100) == cos.annealing(500) == 0.0
    expected = [(1 + math.cos(math.pi / 4)) / 2, 0.5]  # (1 + cos(pi k / K)) / 2
    torch.testing.assert_close([cos.annealing(k) for k in (25, 50)], expected)
    fading = make(anneal="exp", anneal_steps=100)  # exp(-k / K), which never ends
    torch.testing.assert_close(
        [fading.annealing(k) for k in (0, 50, 300)], [1.0, math.exp(-0.5), math.exp(-3)]
    )
    assert make(anneal="fixed", anneal_fixed=0.3).annealing(77) == 0.3


@pytest.mark.parametrize("b", [0.0, 0.3, 0.7, 1.0])
def test_annealed_noise_keeps_its_variance_and_leaves_the_images(b):
    data, method = pairs(8192), make(anneal="fixed", anneal_fixed=b)
    x0, noise = method.endpoints(data, Ctx64(seed=3))
    assert torch.equal(x0, data.x0)
    assert abs(float(noise.var()) - 1.0) < 0.02
    kept = float((noise * data.noise).mean())
    assert abs(kept - (1 - b**2) ** 0.5) < 0.02


@pytest.mark.parametrize("path", PATHS)
def test_without_annealing_it_is_reflow_bit_for_bit(path):
    student, data = Straight(PATHS[path], error=lambda t: 0.1 * t), pairs()
    ours = loss_of(make(PATHS[path], anneal="fixed"), data, student)
    theirs = loss_of(reflow(PATHS[path]), data, student)
    assert torch.equal(ours, theirs)
    late = loss_of(make(PATHS[path], anneal_steps=10), data, student, step=10)
    assert torch.equal(late, loss_of(reflow(PATHS[path]), data, student, step=10))


def test_at_b_one_the_pairing_does_not_matter():
    """The old noise is gone: mispaired data give the very same loss on the same images."""
    data, method = pairs(512), make(anneal="fixed", anneal_fixed=1.0)
    mixed = dataclasses.replace(data, noise=data.noise.roll(1, 0))
    student = GaussianTeacher(FLOW, 0.5)
    torch.testing.assert_close(loss_of(method, mixed, student), loss_of(method, data, student))
    later = make(anneal="fixed", anneal_fixed=0.5)
    assert not torch.equal(loss_of(later, mixed, student), loss_of(later, data, student))


# ------------------------------------------------------------------------------------- mirroring
@pytest.mark.parametrize("flip", ["batch", "sample"])
def test_noise_and_image_are_mirrored_together(flip):
    data, method = pairs(64), make(flip=flip, anneal="fixed")
    shares = set()
    for seed in range(8):
        x0, noise = method.endpoints(data, Ctx64(seed=seed))
        assert x0.shape == noise.shape == data.x0.shape
        torch.testing.assert_close(x0, MU + 0.5 * noise)  # still the pair it was
        mirrored = (noise == data.noise.flip(-1)).flatten(1).all(1)
        kept = (noise == data.noise).flatten(1).all(1)
        assert bool((mirrored ^ kept).all())
        shares.add(float(mirrored.double().mean()))
    assert shares == {0.0, 1.0} if flip == "batch" else all(0.2 < s < 0.8 for s in shares)


def test_mirroring_costs_nothing_where_the_field_is_equivariant():
    plain, flipped = (make(flip=f, anneal="fixed") for f in ("none", "sample"))
    student = Straight(FLOW)
    assert loss_of(plain, pairs(), student) < 1e-16
    assert loss_of(flipped, pairs(), student) < 1e-16


@pytest.mark.parametrize("stage", ["reflow", "distill"])
def test_training_at_the_first_time_sees_what_sampling_starts_from(stage):
    method, student = make(VP, stage=stage, anneal="fixed"), Straight(VP)
    inputs, first = pure_noise_rows(method, student, pairs(1024))
    assert len(inputs) > 30
    assert torch.equal(inputs, first)


# ----------------------------------------------------------------------- flow-guided distillation
@pytest.mark.parametrize("first", ["student", "teacher"])
@pytest.mark.parametrize("path", ["flow", "vp"])
def test_distill_loss_is_zero_at_the_straight_teacher(path, first):
    exact = Straight(PATHS[path])
    method = make(PATHS[path], stage="distill", guide_first=first)
    loss = loss_of(method, pairs(), exact)
    assert loss < 1e-12
    assert make(stage="distill").roles().keys() == {"student", "teacher"}


def test_two_steps_are_the_one_step_of_a_straight_teacher():
    data, teacher = pairs(64), Straight(FLOW)
    method, middle = make(stage="distill"), torch.full((64,), 0.4, dtype=torch.float64)
    one = teacher(data.noise, torch.ones(64, dtype=torch.float64), data.cond).x0
    two = method.two_steps(teacher, one, data.noise, middle, data)
    torch.testing.assert_close(two, one)


def test_two_steps_have_the_papers_form_and_limits():
    """e - (1 - t) v_1 - t v_2(x_t, t); t -> 1: the teacher's step, t -> 0: the first answer."""
    data, teacher, method = pairs(64), GaussianTeacher(FLOW, 0.5), make(stage="distill")
    noise, one = data.noise, torch.ones(64, dtype=torch.float64)
    own = MU + 0.9 * noise
    for middle in (0.2, 0.6, 1.0, 1e-9):
        t = one * middle
        v_1 = noise - own
        x_t = noise - (1 - middle) * v_1
        expected = noise - (1 - middle) * v_1 - middle * teacher(x_t, t, data.cond).flow
        torch.testing.assert_close(method.two_steps(teacher, own, noise, t, data), expected)
    near_one = method.two_steps(teacher, own, noise, one, data)
    torch.testing.assert_close(near_one, teacher(noise, one, data.cond).x0)
    near_zero = method.two_steps(teacher, own, noise, 1e-9 * one, data)
    torch.testing.assert_close(near_zero, own, rtol=0, atol=1e-6)


def test_student_off_by_theta_has_its_closed_form():
    """Straight teacher: the first step off by theta is off by (1 - t) theta at t, from where the
    teacher answers Q (1 - t) / ((1 - t) Q + t) theta off. Only the estimate has gradients."""
    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    student, q = Straight(FLOW, error=lambda t: theta + 0 * t), 0.5
    teacher, data = Straight(FLOW), pairs(64)
    loss = loss_of(make(stage="distill"), data, student, teacher)
    loss.backward()
    ((_, t),) = teacher.seen
    assert bool(((t > 0.2) & (t < 0.8)).all())
    left = 1 - (1 - t) * q / ((1 - t) * q + t)
    torch.testing.assert_close(loss.item(), 0.04 * (1 + (left**2).mean()).item())
    torch.testing.assert_close(theta.grad.item(), 0.4 * (1 + left.mean()).item())


def test_guidance_reaches_the_teacher_alone():
    data = pairs(64)
    null = dataclasses.replace(data, null=data.cond._map(torch.zeros_like))
    teacher, one = GaussianTeacher(FLOW, 0.5), torch.ones(64, dtype=torch.float64)
    method = make(stage="distill", guidance=2.0)
    found = method.two_steps(teacher, data.noise, data.noise, one, null)
    torch.testing.assert_close(found, torch.full_like(found, 2 * MU))


def test_lpips_judges_both_terms():
    seen = []

    def judge(images, by):
        seen.append(by.requires_grad)
        return (images - by).square().mean(dim=(1, 2, 3))

    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    student = Straight(FLOW, error=lambda t: theta + 0 * t)
    totals = []
    for loss in ("l2", "lpips", "l2_lpips"):
        method = make(stage="distill", loss=loss)
        nets = AnalyticNets(
            {"student": student, "teacher": Straight(FLOW)}, scorers={"lpips": judge}
        )
        (phase,) = method.phases(0)
        totals.append(phase.loss(nets, pairs(64), Ctx64(seed=1)).total)
    assert seen == [False] * 4
    torch.testing.assert_close(totals[0], totals[1])
    torch.testing.assert_close(totals[2], totals[0] + totals[1])
    assert make(stage="distill", loss="l2_lpips").scorers().keys() == {"lpips"}


def test_the_one_call_may_be_told_a_time_before_noise():
    """Released t0: pure noise in, 0.999 told, x0 = z - 0.999 v; the sampler does the same."""
    method, data = make(stage="distill", start_time=0.999), pairs(64)
    student, teacher = Straight(FLOW), Straight(FLOW)
    loss_of(method, data, student, teacher)
    assert [float(t.min()) for _, t in student.seen] == [0.999, 0.999]
    assert torch.equal(student.seen[0][0], data.noise)
    assert method.sampler().times == method.sampler().trained_times == (0.999,)
    noise, middle = data.noise, torch.full((64,), 0.4, dtype=torch.float64)
    own = MU + 0.9 * noise
    x_t = noise + (0.4 - 0.999) * (noise - own) / 0.999
    found = method.two_steps(teacher, own, noise, middle, data)
    torch.testing.assert_close(found, teacher(x_t, middle, data.cond).x0)
    assert make(VP, stage="distill", start_time=0.999).trained_times() == (0.999,)
    assert make(start_time=0.999, num_steps=2).sampler().times == (1.0, 0.5), (
        "stage distill's alone"
    )


# ---------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide_range": (0.0, 0.8)}, "guide_range"),
        ({"stage": "distill", "setup": "raw"}, "'wrapped' in stage distill"),
        ({"stage": "distill", "num_steps": 2}, "expected 1 and no student_times"),
        ({"loss": "lpips"}, "'l2' in stage reflow"),
        ({"stage": "distill", "start_time": 0.7}, "high < start_time"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "name",
    [
        "slimflow_reflow",
        "slimflow_distill",
        *(f"instaflow_{s}" for s in ("reflow", "distill_l2", "distill_lpips")),
    ],
)
def test_shipped_configs_are_valid(name):
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="m", **raw)
    method = (make if run.method == "slimflow" else reflow)(VP, **run.method_config)
    assert method.config.stage == ("reflow" if name.endswith("reflow") else "distill")
    assert ("lpips" in method.scorers()) == name.endswith("lpips")
