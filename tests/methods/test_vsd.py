"""vsd on analytic teachers: both branches guided, its weight, its fake's loss, random guidance."""

from __future__ import annotations

import warnings

import pytest
import torch
from pydantic import ValidationError
from support.score import BSZ, PATHS, VP, Leaf, Recorder, batch_of, fake_loss, student_loss
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, expand
from stepdistill.core.types import Cond
from stepdistill.methods.rollout import Sample
from stepdistill.methods.vsd import VSD, VSDConfig
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def make(path: NoisePath, kind: str = "x0", **options: object) -> VSD:
    return VSD(VSDConfig(**options), Setting(path, kind))  # type: ignore[arg-type]


class Scaled(GaussianTeacher):
    """The teacher with the mean of every condition times `gain`."""

    def __init__(self, path: NoisePath, gain: float) -> None:
        super().__init__(path, 0.6)
        self.gain = gain

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return super().posterior_mean(x_t, t, Cond({"mean": self.gain * cond["mean"]}))


def networks(
    path: NoisePath, gain: float = 1.0, kind: str = "x0"
) -> tuple[Leaf, Recorder, Recorder, AnalyticNets]:
    """(student whose x0 is a parameter, teacher, fake, all of them)."""
    x0 = torch.randn(BSZ, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    teacher = Recorder(GaussianTeacher(path, 0.6, kind))  # type: ignore[arg-type]
    fake = teacher if gain == 1.0 else Recorder(Scaled(path, gain))
    leaf = Leaf(path, x0)
    return leaf, teacher, fake, AnalyticNets({"student": leaf, "teacher": teacher, "fake": fake})


# -------------------------------------------------------------------------- student's gradient
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("guidance", [{"guidance": 4.5}, {"guidance_range": (0.5, 4.0)}])
def test_no_gradient_where_the_fake_is_the_teacher_though_both_are_guided(
    path: NoisePath, kind: str, guidance: dict[str, object]
) -> None:
    leaf, _, _, nets = networks(path, kind=kind)
    method = make(path, kind, student_times=(0.4,), **guidance)
    for step in range(3):
        student_loss(method, nets, batch_of(), Ctx(step=step)).total.backward()
    assert torch.equal(leaf.x0.grad, torch.zeros_like(leaf.x0))


def test_gradient_is_alpha_sigma_times_the_guided_difference(path: NoisePath) -> None:
    """Means off by 10 %: guided means g m and 1.1 g m (null mean 0), each with gain sigma^2 / V."""
    leaf, teacher, _, nets = networks(path, gain=1.1)
    batch = batch_of()
    student_loss(make(path, guidance=4.5), nets, batch).total.backward()
    t = teacher.calls[0][1][:BSZ]
    alpha, sigma = path.coeffs(t)
    gap = 0.1 * 4.5 * batch.cond["mean"] * (sigma**2 / (alpha**2 * 0.36 + sigma**2))[:, None]
    expected = (alpha * sigma)[:, None] * gap / leaf.x0.numel()
    torch.testing.assert_close(leaf.x0.grad, expected, rtol=1e-4, atol=1e-9)


def test_gradient_is_the_papers_noise_difference(path: NoisePath) -> None:
    """sigma^2 (eps_real - eps_fake), from the two guided noise predictions."""
    leaf, teacher, fake, nets = networks(path, gain=0.8)
    batch = batch_of()
    student_loss(make(path, guidance=3.0), nets, batch).total.backward()
    x_t, t = (x[:BSZ] for x in teacher.calls[0][:2])
    real, fake_ = (n.inner(x_t, t, batch.cond, batch.null, 3.0).eps for n in (teacher, fake))
    expected = expand(path.coeffs(t)[1] ** 2, x_t) * (real - fake_) / leaf.x0.numel()
    torch.testing.assert_close(leaf.x0.grad, expected, rtol=1e-4, atol=1e-8)


def test_teacher_and_fake_see_the_same_guided_batch(path: NoisePath) -> None:
    _, teacher, fake, nets = networks(path, gain=0.8)
    student_loss(make(path), nets, batch_of(), Ctx(phase="student"))
    assert len(teacher.calls) == len(fake.calls) == 1
    assert torch.equal(teacher.calls[0][0], fake.calls[0][0])
    assert len(fake.calls[0][0]) == 2 * BSZ  # cond and null
    assert not fake.calls[0][3]  # without graph


# ------------------------------------------------------------------------------ random guidance
def test_random_guidance_is_one_number_for_both_branches_and_all_ranks() -> None:
    method, drawn = make(FlowPath(), guidance_range=(0.5, 4.0)), []
    for step in range(200):
        pairs = {
            method.guidances(
                method.draw_guidance(Ctx(step=step, phase="student", rank=rank, world_size=4))
            )
            for rank in range(4)
        }
        assert len(pairs) == 1
        real, fake = pairs.pop()
        assert real == fake
        drawn.append(real)
    g = torch.tensor(drawn)
    assert g.min() >= 0.5
    assert g.max() < 4.0
    assert g.mean().item() == pytest.approx(2.25, abs=0.25)
    assert g.std().item() == pytest.approx(3.5 / 12**0.5, rel=0.15)


def test_the_drawn_guidance_is_the_one_applied() -> None:
    leaf, teacher, fake, nets = networks(FlowPath(), gain=0.8)
    method, batch = make(FlowPath(), guidance_range=(0.5, 4.0)), batch_of()
    drawn = []
    method.draw_guidance = lambda ctx: drawn.append(VSD.draw_guidance(method, ctx)) or drawn[-1]  # type: ignore[method-assign, func-returns-value]
    student_loss(method, nets, batch, Ctx(step=7)).total.backward()
    x_t, t = (x[:BSZ] for x in teacher.calls[0][:2])
    g = drawn[0]
    assert g not in (1.0, 4.5)
    real, fake_ = (n.inner(x_t, t, batch.cond, batch.null, g).x0 for n in (teacher, fake))
    expected = (t * (1 - t))[:, None] * (fake_ - real) / leaf.x0.numel()
    torch.testing.assert_close(leaf.x0.grad, expected, rtol=1e-4, atol=1e-8)


def test_a_guidance_that_a_range_overrules_warns() -> None:
    with pytest.warns(UserWarning, match="guidance 2.0 has no effect"):
        VSDConfig(guidance=2.0, guidance_range=(0.5, 4.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        VSDConfig(guidance_range=(0.5, 4.0))


@pytest.mark.parametrize("value", [(4.0, 0.5), (2.0, 2.0), (-1.0, 2.0)])
def test_an_empty_guidance_range_is_refused(value: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="guidance_range"):
        VSDConfig(guidance_range=value)


# ------------------------------------------------------------------------------- the fake's loss
@pytest.mark.parametrize("fake_weight", ["alpha2", "none"])
def test_the_fakes_loss_is_its_weighted_noise_error(path: NoisePath, fake_weight: str) -> None:
    options = {"null_probability": 0.0, "fake_weight": fake_weight, "fake_t_range": (0.3, 0.9)}
    leaf, _, fake, nets = networks(path, gain=0.8)
    x0 = leaf.x0.detach()
    ctx = Ctx(phase="fake", carry={"sample": Sample(x0, batch_of().cond)})
    loss = fake_loss(make(path, **options), nets, batch_of(), ctx).total
    x_t, t, seen, _ = fake.calls[0]
    alpha, sigma = (c[:, None] for c in path.coeffs(t))
    noise = (x_t - alpha * x0) / sigma
    error = (fake.inner(x_t, t, seen).eps - noise).square()
    expected = ((alpha**2 if fake_weight == "alpha2" else 1.0) * error).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert len(x_t) == BSZ  # trained without guidance


@pytest.mark.parametrize(("probability", "expected"), [(0.0, 0), (1.0, 300), (0.1, 30)])
def test_the_null_prompt_replaces_whole_batches_at_its_rate(
    probability: float, expected: int
) -> None:
    method = make(VP, null_probability=probability)
    cond, null = Cond({"mean": torch.ones(4, 1)}), Cond({"mean": torch.zeros(4, 1)})
    dropped = 0
    for step in range(300):
        seen = {
            method.fake_cond(cond, null, Ctx(step=step, phase="fake", rank=rank, world_size=2))
            is null
            for rank in range(2)
        }
        assert len(seen) == 1  # the same on every rank
        dropped += seen.pop()
    assert dropped == pytest.approx(expected, abs=0 if probability in (0.0, 1.0) else 13)


def test_the_fake_is_told_the_condition_it_drew() -> None:
    for probability, mean in ((0.0, batch_of().cond["mean"]), (1.0, batch_of().null["mean"])):
        _, _, fake, nets = networks(FlowPath(), gain=0.8)
        ctx = Ctx(phase="fake", carry={"sample": Sample(torch.zeros(BSZ, 2), batch_of().cond)})
        fake_loss(make(FlowPath(), null_probability=probability), nets, batch_of(), ctx)
        assert torch.equal(fake.calls[0][2]["mean"], mean)


def test_one_fake_update_a_step_on_the_students_own_sample_and_prompts_alone() -> None:
    method = make(FlowPath())
    assert [(p.name, p.trains, p.repeat) for p in method.phases(0)] == [
        ("student", ("student",), 1),
        ("fake", ("fake",), 1),
    ]
    assert method.needs == {"cond"}
    assert method.sampler().times == (1.0,)
    leaf, _, fake, nets = networks(FlowPath(), gain=0.8)
    ctx = Ctx(phase="student")
    student_loss(method, nets, batch_of(), ctx)
    fake_loss(method, nets, batch_of(), Ctx(phase="fake", carry=ctx.carry))
    x_t, t, _, _ = fake.calls[1]
    noise = (x_t - expand(1 - t, x_t) * leaf.x0.detach()) / expand(t, x_t)
    assert noise.std().item() == pytest.approx(1.0, abs=0.2)
