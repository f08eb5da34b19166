"""Options of dmd2: guidance at times of its own, a fake drawn to the student, a near teacher."""

from __future__ import annotations

import pytest
import torch
from support.score import BSZ, PATHS, Leaf, Recorder, batch_of, make, student_loss

from stepdistill.core.context import Ctx
from stepdistill.core.path import NoisePath
from stepdistill.core.times import beta_times
from stepdistill.core.types import Batch
from stepdistill.methods.dmd2 import DMD2
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def setup(path: NoisePath) -> tuple[Leaf, AnalyticNets, Batch]:
    """A teacher N(row, 0.6^2) by condition, its null at 0, and a wider fake."""
    x0 = torch.randn(BSZ, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf, teacher = Leaf(path, x0), Recorder(GaussianTeacher(path, 0.6))
    nets = AnalyticNets({"student": leaf, "teacher": teacher, "fake": GaussianTeacher(path, 0.9)})
    return leaf, nets, batch_of()


def gradient(method: DMD2, path: NoisePath, step: int = 0) -> torch.Tensor:
    leaf, nets, batch = setup(path)
    student_loss(method, nets, batch, Ctx(step=step, seed=3)).total.backward()
    assert leaf.x0.grad is not None
    return leaf.x0.grad


# ------------------------------------------------------------------- guidance at its own times
class OnePoint(DMD2):
    """Every noised sample is the same: its noise is that of a law without draws."""

    def noised(self, ctx, sample, t_range, within=None):  # type: ignore[no-untyped-def]
        t = torch.full((len(sample.x0),), 0.4, dtype=torch.float64)
        noise = torch.linspace(-1, 1, sample.x0.numel()).view_as(sample.x0)
        return self.setting.path.add_noise(sample.x0, noise, t), t, noise


@pytest.mark.parametrize("weight", ["dmd_l1", "sigma2", "uniform"])
def test_at_one_point_both_terms_are_plain_dmd2(path: NoisePath, weight: str) -> None:
    """(y_f - y_r) - (g - 1) (y_r - y_null) = y_f - y_guided, normaliser included."""
    found = []
    for ca_times in ("shared", "below_step"):
        method = make(path, guidance=3.0, weight=weight, ca_times=ca_times)
        found.append(gradient(OnePoint(method.config, method.setting), path))
    assert torch.allclose(*found, rtol=1e-5, atol=1e-9)


def test_guidance_is_measured_below_the_student_s_step_and_the_rest_everywhere() -> None:
    path, step, tops = PATHS["flow"], 0.5, [[], []]
    method = make(path, guidance=3.0, ca_times="below_step", student_times=(1.0, step))
    for k in range(12):
        _, nets, batch = setup(path)
        student_loss(method, nets, batch, Ctx(step=k))
        asked = [t for _, t, _, _ in nets["teacher"].calls]
        assert [len(t) for t in asked] == [2 * BSZ, BSZ]  # guided; then without guidance
        assert torch.equal(asked[0][:BSZ], asked[0][BSZ:])
        assert not torch.equal(asked[0][:BSZ], asked[1])
        for top, t in zip(tops, asked, strict=True):
            top.append(float(t.max()))
    below, everywhere = tops
    assert min(everywhere) > 0.9
    assert sorted({top > step for top in below}) == [False, True]  # the second step, the first
    assert all(top <= step or top > 0.9 for top in below)


def test_a_range_ends_at_the_student_s_time_on_every_path(path: NoisePath) -> None:
    method = make(path, shift=3.0)
    top = path.snap(torch.full((64,), 0.5, dtype=torch.float64))
    t = method.draw_times(Ctx(), 64, (0.02, 0.98), (0.0, top))
    assert float(t.max()) <= 0.5 + 1e-3
    assert float(t.max()) > 0.45
    assert torch.equal(
        method.draw_times(Ctx(), 64, (0.02, 0.98), (0.0, torch.ones(64).double())),
        method.draw_times(Ctx(), 64, (0.02, 0.98)),
    )


def test_no_guidance_leaves_nothing_to_measure(path: NoisePath) -> None:
    with pytest.warns(UserWarning, match="ca_times below_step has no effect: guidance 1"):
        method = make(path, ca_times="below_step")
    assert torch.equal(gradient(method, path), gradient(make(path), path))


# ------------------------------------------------------------------- a fake drawn to the student
def test_the_fake_is_mixed_after_each_update() -> None:
    _, nets, _ = setup(PATHS["flow"])
    make(PATHS["flow"]).after(nets, 0)
    assert nets.mixes == []
    make(PATHS["flow"], fake_toward_student=0.02).after(nets, 0)
    assert nets.mixes == [("fake", "student", 0.02)]


# ------------------------------------------------------------------- a teacher near the fake
def test_a_teacher_that_carries_all_of_the_fake_moves_no_one(path: NoisePath) -> None:
    method = make(path, approach={"share": 1.0, "updates": 10})
    assert torch.equal(gradient(method, path), torch.zeros(BSZ, 2))
    assert float(gradient(method, path, step=5).abs().max()) > 0


def test_the_walk_ends_at_the_teacher_itself(path: NoisePath) -> None:
    method = make(path, approach={"share": 0.75, "updates": 10, "noisy_first": True})
    for step in (10, 11):
        assert torch.equal(gradient(method, path, step), gradient(make(path), path, step))
    assert method.config.approach.left(0) == 1.0
    assert method.config.approach.left(5) == pytest.approx(0.5)


def test_beta_times_follow_their_law() -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for a, b in ((1.0, 1.0), (4.0, 1.5), (2.5, 1.25)):
        t, variance = beta_times(u, a, b), a * b / ((a + b) ** 2 * (a + b + 1))
        assert float(t.mean()) == pytest.approx(a / (a + b), abs=2e-4)
        assert float(t.var()) == pytest.approx(variance, rel=2e-3)
        assert bool((t.diff() >= 0).all())
        assert 0.0 <= float(t[0]) < float(t[-1]) <= 1.0
    assert torch.allclose(beta_times(u, 1.0, 1.0), u, atol=1e-12)
    assert beta_times(torch.tensor([0.0, 1.0]), 1.0, 1.0).tolist() == pytest.approx([0.0, 1.0])


def test_times_are_noisy_at_first() -> None:
    method = make(PATHS["flow"], approach={"updates": 10, "noisy_first": True})
    means = [
        float(method.draw_times(Ctx(step=step), 4096, (0.0, 1.0)).mean()) for step in (0, 5, 10)
    ]
    assert means == pytest.approx([4 / 5.5, 2.5 / 3.75, 0.5], abs=0.01)
