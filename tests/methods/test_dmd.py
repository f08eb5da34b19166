"""DMD: dmd2's gradient plus a regression whose size off the pairs is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.score import PATHS, VP, Affine, Gaussian, Recorder, batch_of

from stepdistill.config.run import RunConfig
from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import NoisePath
from stepdistill.core.types import Batch
from stepdistill.methods.dmd import DMD, DMDConfig
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.testing.analytic import AnalyticNets

CONFIG = Path(__file__).parents[2] / "configs" / "methods" / "dmd.yaml"
MEAN, FACTOR = torch.tensor([1.0, -0.5]), torch.tensor([[0.8, 0.0], [0.5, 0.4]])


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def make(path: NoisePath = VP, **options: Any) -> DMD:
    config = {"regression": "l2", "student_times": (0.4,), "guidance": 1.0, **options}
    return DMD(DMDConfig(**config), Setting(path, "x0"))


def pairs() -> Batch:
    """The teacher's own map, x0 = MEAN + FACTOR noise."""
    plain = batch_of()
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn((plain.bsz, 2), generator=generator, dtype=torch.float64)
    x0 = MEAN + noise @ FACTOR.double().T
    return Batch(plain.cond, plain.null, plain.shape, x0=x0, noise=noise)


def loss_of(method: DMD2, path: NoisePath, off: float, batch: Batch) -> tuple[Any, Affine]:
    """The loss of the student MEAN + off + FACTOR z against the teacher and its exact fake."""
    student = Affine(path, FACTOR.double(), MEAN.double() + off)
    teacher = Gaussian(path, lambda: (MEAN, FACTOR @ FACTOR.T))
    fake = Gaussian(path, student.law)
    nets = AnalyticNets({"student": student, "teacher": teacher, "fake": fake})
    phase = method.phases(0)[0]
    return phase.loss(nets, batch, Ctx(seed=3, phase=phase.name)), student


def test_no_gradient_at_the_teachers_own_map(path: NoisePath) -> None:
    losses, student = loss_of(make(path), path, 0.0, pairs())
    losses.total.backward()
    assert float(losses.logs["regression"]) < 1e-12
    assert student.weight.grad.abs().max() < 1e-6
    assert student.bias.grad.abs().max() < 1e-6


def test_it_is_dmd2_plus_the_weighted_distance(path: NoisePath) -> None:
    """A student off by theta on pairs: theta^2, gradient 2 theta / D on each of D numbers."""
    plain = DMD2(DMD2Config(student_times=(0.4,), guidance=1.0), Setting(path, "x0"))
    theirs, student = loss_of(plain, path, 0.3, pairs())
    theirs.total.backward()
    before = student.bias.grad.clone()
    ours, student = loss_of(make(path, regression_weight=2.0), path, 0.3, pairs())
    ours.total.backward()
    assert float(ours.logs["dm"]) == float(theirs.logs["dm"])
    torch.testing.assert_close((ours.total - theirs.total).item(), 2.0 * 0.09, rtol=1e-5, atol=1e-6)
    expected = before + 2.0 * 2 * 0.3 / 2
    torch.testing.assert_close(student.bias.grad, expected, rtol=1e-5, atol=1e-6)


def test_regression_starts_from_the_pairs_own_noise() -> None:
    method, batch = make(), pairs()
    student = Recorder(Affine(VP, FACTOR.double(), MEAN.double()))
    teacher = Gaussian(VP, lambda: (MEAN, FACTOR @ FACTOR.T))
    nets = AnalyticNets({"student": student, "teacher": teacher, "fake": teacher})
    method.phases(0)[0].loss(nets, batch, Ctx())
    (fresh, *_), (own, t, *_) = student.calls
    assert torch.equal(own, batch.noise)
    assert not torch.equal(fresh, own)
    assert t.unique().tolist() == [0.4]


def test_lpips_judges_decoded_images() -> None:
    def judge(images: Any, by: Any) -> Any:
        return 3.0 * (images - by).square().mean(1)

    student = Affine(VP, FACTOR.double(), MEAN.double() + 0.1)
    teacher = Gaussian(VP, lambda: (MEAN, FACTOR @ FACTOR.T))
    nets = AnalyticNets(
        {"student": student, "teacher": teacher, "fake": teacher}, scorers={"lpips": judge}
    )
    found = make(regression="lpips").phases(0)[0].loss(nets, pairs(), Ctx()).logs["regression"]
    torch.testing.assert_close(float(found), 3.0 * 0.01, rtol=1e-5, atol=1e-6)
    assert make(regression="lpips").scorers().keys() == {"lpips"}
    assert make().scorers() == {}
    assert make().needs == {"cond", "x0", "noise"}


@pytest.mark.parametrize(
    "options",
    [{"num_steps": 2, "student_times": None}, {"gan": {"weight_g": 0.1}}, {"rollout": "data"}],
)
def test_what_dmd2_alone_can_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="dmd2 has these, without pairs"):
        make(**options)


def test_shipped_config_is_valid() -> None:
    run = RunConfig(pretrained_model_name_or_path="m", **yaml.safe_load(CONFIG.read_text()))
    config = DMDConfig(**run.method_config)
    assert (config.regression, config.regression_weight, config.critic_steps) == ("lpips", 0.25, 1)
