"""The contract of score distillation: methods of other shapes, each a page on its public hooks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from support.score import (
    BSZ,
    PATHS,
    VP,
    Affine,
    Gaussian,
    Leaf,
    Recorder,
    batch_of,
    closed_form,
    fake_loss,
    student_loss,
)
from torch import Tensor

from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Prediction
from stepdistill.core.method import Nets, Phase, Setting
from stepdistill.core.path import FlowPath, NoisePath, expand
from stepdistill.core.solvers import SamplerSpec, ode_solve, sample_x0
from stepdistill.core.types import Batch, Losses
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scores import ScoreDistillation, Scores
from stepdistill.methods.scores_config import ScoreConfig, TimeRange
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


class Plain(ScoreDistillation[ScoreConfig]):
    """The base as it stands."""

    name, paper, Config = "plain", "", ScoreConfig


def make(cls: type[Plain], path: NoisePath, **options: object) -> Plain:
    return cls(ScoreConfig(**{"guidance": 1.0, **options}), Setting(path, "x0"))  # type: ignore[arg-type]


def leaf_nets(path: NoisePath, fake_std: float = 0.9) -> tuple[Leaf, AnalyticNets]:
    x0 = torch.randn(BSZ, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = Leaf(path, x0)
    roles = {"teacher": GaussianTeacher(path, 0.6), "fake": GaussianTeacher(path, fake_std)}
    return leaf, AnalyticNets({"student": leaf, **roles})


def gradient_of(method: Plain, path: NoisePath, **nets: float) -> Tensor:
    leaf, roles = leaf_nets(path, **nets)
    student_loss(method, roles, batch_of()).total.backward()  # type: ignore[arg-type]
    assert leaf.x0.grad is not None
    return leaf.x0.grad


def test_the_base_alone_is_dmd2(path: NoisePath) -> None:
    dmd2 = DMD2(DMD2Config(guidance=1.0), Setting(path, "x0"))
    assert torch.equal(gradient_of(make(Plain, path), path), gradient_of(dmd2, path))  # type: ignore[arg-type]


# ------------------------------------------ a graph through both scores (SiD, arXiv:2404.04057)
class SiD(Plain):
    """(y_r - y_f) ((y_r - x) - a (y_r - y_f)), differentiated through both denoisers."""

    alpha = 1.0
    through_scores = True

    def matching(self, sample: Sample, scores: Scores, weights: Tensor | None = None) -> Tensor:
        real, gap = scores.real.x0, scores.real.x0 - scores.fake.x0
        return (gap * ((real - sample.x0) - self.alpha * gap)).mean()


def test_a_loss_may_be_differentiated_through_both_scores(path: NoisePath) -> None:
    """Their slopes k_r, k_f in x_t count: the gradient is the derivative of the closed form."""
    leaf, nets = leaf_nets(path)
    method = make(SiD, path)
    student_loss(method, nets, batch_of()).total.backward()  # type: ignore[arg-type]
    x0, (real, fake) = closed_form(method, nets, path, leaf, 0.6, 0.9)
    gap = real - fake
    (gap * ((real - x0) - gap)).mean().backward()
    torch.testing.assert_close(leaf.x0.grad, x0.grad, rtol=1e-5, atol=1e-9)
    detached = gradient_of(make(Plain, path, weight="uniform"), path)
    assert not torch.allclose(leaf.x0.grad, detached, rtol=0.1)  # type: ignore[arg-type]


# -------------------------------- two terms at times of their own (Decoupled DMD, arXiv:2511.22677)
@dataclass(frozen=True)
class Decoupled(Scores):
    """`real` without guidance; cond and null of the teacher at a point of their own."""

    cond: Prediction
    null: Prediction


class DecoupledDMD(Plain):
    shared = False

    def scores(self, nets: Nets, batch: Batch, ctx: Ctx, sample: Sample) -> Scores:
        config = self.config
        x_t, t, _ = self.noised(ctx, sample, config.dm_t_range)
        both = (
            self.teacher_score(nets, batch, x_t, t, 1.0),
            self.fake_score(nets, batch, x_t, t, 1.0),
        )
        if not self.shared:
            assert sample.t is not None
            x_t, t, _ = self.noised(ctx, sample, (0.0, float(sample.t[0])))
        with torch.no_grad():
            cond, null = (nets["teacher"](x_t, t, c) for c in (batch.cond, batch.null))
        return Decoupled(*both, cond, null)

    def gradient(self, sample: Sample, scores: Scores) -> Tensor:
        assert isinstance(scores, Decoupled)
        push = (self.config.guidance - 1.0) * (scores.null.x0 - scores.cond.x0)
        return (scores.fake.x0 - scores.real.x0 + push).detach()


def test_guidance_at_a_time_of_its_own_is_dmd2_where_the_times_are_shared(path: NoisePath) -> None:
    plain = gradient_of(make(Plain, path, guidance=3.0, weight="uniform"), path)
    method = make(DecoupledDMD, path, guidance=3.0)
    assert not torch.allclose(gradient_of(method, path), plain, rtol=0.1)
    method.shared = True  # type: ignore[attr-defined]
    torch.testing.assert_close(gradient_of(method, path), plain, rtol=1e-6, atol=1e-9)


# ------------------------------ noise from the next step of the path (TDM, arXiv:2503.06674)
class TDM(Plain):
    """A step is judged from the state it leads to: x_m at t_m, then noise up to t in [t_m, t_k]."""

    def before(self, sample: Sample) -> float:
        assert sample.t is not None
        later = [t for t in self.rollout.times if t < float(sample.t[0])]
        return later[0] if later else 0.0

    def noised(self, ctx: Ctx, sample: Sample, t_range: TimeRange) -> tuple[Tensor, Tensor, Tensor]:
        assert sample.t is not None
        assert sample.x_t is not None
        path, low, bsz = self.setting.path, self.before(sample), len(sample.x0)
        x_m = path.step(sample.x0, sample.x_t, sample.t, ctx.times(low, bsz))
        t = self.draw_times(ctx, bsz, (max(0.02, low), float(sample.t[0])))
        noise = ctx.randn(tuple(x_m.shape))
        return path.renoise(x_m, ctx.times(low, bsz), t, noise), t, noise


def test_each_step_is_judged_on_its_own_noise_levels_by_both_losses() -> None:
    path = FlowPath()
    method = make(TDM, path, num_steps=4, sampler="ode")
    teacher, fake = Recorder(GaussianTeacher(path, 0.6)), Recorder(GaussianTeacher(path, 0.9))
    student = Recorder(Affine(path, torch.eye(2), torch.zeros(2)))
    nets = AnalyticNets({"student": student, "teacher": teacher, "fake": fake})
    for step in range(8):
        for recorder in (teacher, fake, student):
            recorder.calls.clear()
        ctx = Ctx(step=step, phase="student")
        student_loss(method, nets, batch_of(), ctx)  # type: ignore[arg-type]
        fake_loss(method, nets, batch_of(), Ctx(step=step, phase="fake", carry=ctx.carry))  # type: ignore[arg-type]
        start = float(student.calls[-1][1][0])
        for _, t, _, _ in (*teacher.calls, *fake.calls):
            assert max(0.02, start - 0.25) - 1e-9 <= float(t.min()) <= float(t.max()) <= start


# ------------------------------- a target that walks to the teacher (DisBack, arXiv:2408.15991)
class DisBack(Plain):
    """The teacher's place is taken by snapshots on the way from the student to the teacher."""

    def teacher_score(
        self, nets: Nets, batch: Batch, x_t: Tensor, t: Tensor, g: float
    ) -> Prediction:
        with torch.no_grad():
            return nets["target"](x_t, t, batch.cond, batch.null, g)


def test_a_snapshot_may_stand_in_for_the_teacher(path: NoisePath) -> None:
    leaf, nets = leaf_nets(path)
    same = AnalyticNets({"student": leaf, "fake": nets["fake"], "target": nets["fake"]})  # type: ignore[dict-item]
    student_loss(make(DisBack, path), same, batch_of()).total.backward()  # type: ignore[arg-type]
    assert torch.equal(leaf.x0.grad, torch.zeros_like(leaf.x0))


# ------------------------------------- beside another loss, one student of several (rCM, MSD)
class Beside(Plain):
    """100 times a loss of its own on the data, and the score's on the student's samples."""

    def student_loss(self, nets: Nets, batch: Batch, ctx: Ctx) -> Losses:
        assert batch.x0 is not None
        own = (self.sample(nets, batch, ctx).x0 - batch.x0).square().mean()
        return super().student_loss(nets, batch, replace(ctx, phase="dm")).plus(100.0, own, own=own)


def test_another_loss_stands_beside_the_scores(path: NoisePath) -> None:
    leaf, nets = leaf_nets(path)
    method = make(Beside, path)
    losses = student_loss(method, nets, batch_of(x0=torch.zeros(BSZ, 2)))  # type: ignore[arg-type]
    losses.total.backward()
    score = Ctx(phase="dm")
    alone, others = leaf_nets(path)
    make(Plain, path).student_loss(others, batch_of(), score).total.backward()
    expected = alone.x0.grad + 100.0 * 2.0 * leaf.x0 / leaf.x0.numel()
    torch.testing.assert_close(leaf.x0.grad, expected, rtol=1e-6, atol=1e-9)
    assert set(losses.logs) == {"dm", "own"}


class View:
    """Nets in which `student` and `fake` are those of one student of several."""

    def __init__(self, nets: Nets, k: int) -> None:
        self.nets, self.k = nets, k

    def __getitem__(self, role: str) -> object:
        return self.nets[role if role == "teacher" else f"{role}_{self.k}"]


class Several(Plain):
    def phases(self, step: int) -> Sequence[Phase]:
        def of(phase: Phase, k: int) -> Phase:
            trains = tuple(f"{role}_{k}" for role in phase.trains)
            loss = phase.loss
            return replace(
                phase, name=f"{phase.name}_{k}", trains=trains,
                loss=lambda nets, batch, ctx: loss(View(nets, k), batch, ctx),  # type: ignore[arg-type]
            )  # fmt: skip

        return [of(phase, k) for k in range(2) for phase in super(Several, self).phases(step)]


def test_several_students_have_a_fake_each() -> None:
    leaves = [leaf_nets(VP, std) for std in (0.9, 0.6)]
    roles = {"teacher": leaves[0][1]["teacher"]}
    for k, (leaf, nets) in enumerate(leaves):
        roles |= {f"student_{k}": leaf, f"fake_{k}": nets["fake"]}
    phases = make(Several, VP).phases(0)
    assert [p.trains for p in phases[:3:2]] == [("student_0",), ("student_1",)]
    for phase in phases[::2]:
        phase.loss(AnalyticNets(roles), batch_of(), Ctx(phase="student")).total.backward()  # type: ignore[arg-type]
    assert leaves[0][0].x0.grad.abs().max() > 0
    assert torch.equal(leaves[1][0].x0.grad, torch.zeros(BSZ, 2).double())


# --------------------------------------------------- a fake that is fitted guided (SiD-LSG)
class LSG(Plain):
    def guidances(self, g: float) -> tuple[float, float]:
        return g, g

    @property
    def fitted_guidance(self) -> float:
        return self.config.guidance


def test_the_fakes_guided_prediction_may_be_the_one_that_is_fitted(path: NoisePath) -> None:
    """A fake whose guided mean is the sample's own: no error beyond the posterior's."""
    fake = Recorder(GaussianTeacher(path, 0.6))
    nets = AnalyticNets({"student": Affine(path, torch.eye(2), torch.zeros(2)), "fake": fake})
    method = make(LSG, path, guidance=2.0)
    made = batch_of().cond["mean"] * 2.0 + 0.6 * torch.randn(BSZ, 2)
    ctx = Ctx(phase="fake", carry={"sample": Sample(made, batch_of().cond)})
    guided = fake_loss(method, nets, batch_of(), ctx).total.item()  # type: ignore[arg-type]
    assert len(fake.calls[0][0]) == 2 * BSZ
    plain = make(Plain, path)
    unguided = fake_loss(plain, nets, batch_of(), Ctx(phase="fake", carry=ctx.carry)).total.item()  # type: ignore[arg-type]
    assert guided <= 0.36 + 0.1
    assert guided < 0.1 * unguided
    assert method.fake_fit is not None
    assert (method.fake_fit.teacher, method.fake_fit.fake, method.fake_fit.fitted) == (
        2.0,
        2.0,
        2.0,
    )


# ------------------------------------------------------------------------------- skip_layers
def test_without_guidance_there_is_nothing_to_leave_a_block_out_of() -> None:
    with pytest.warns(UserWarning, match="skip_layers .* has no effect: guidance 1"):
        make(Plain, VP, guidance=1.0, skip_layers=("block.7",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(Plain, VP, guidance=3.0, skip_layers=("block.7",))


# ------------------------------------------------------------------------------- warm start
def exact_nets(path: NoisePath) -> AnalyticNets:
    """A teacher N(1, 0.6^2) in each of two dimensions, and a student that answers as it does."""
    law = (torch.ones(2), 0.36 * torch.eye(2))
    teacher = Recorder(Gaussian(path, lambda: law))
    student = Recorder(Gaussian(path, lambda: law))
    return AnalyticNets({"student": student, "teacher": teacher})


@pytest.mark.full
@pytest.mark.parametrize("num_steps", [1, 4])
def test_the_warm_start_learns_the_trajectorys_end_from_its_states(
    path: NoisePath, num_steps: int
) -> None:
    """The student answers as the teacher does; the flow map of a Gaussian is known."""
    options = {"updates": 12, "teacher_steps": 128}
    method = make(Plain, path, num_steps=num_steps, warm_start=options)
    nets, seen = exact_nets(path), set()
    student = nets["student"]
    assert isinstance(student, Recorder)
    for step in range(12):
        phase = method.phases(step)[0]
        losses = phase.loss(nets, batch_of(), Ctx(step=step, phase="student"))
        assert set(losses.logs) == {"warm_start"}
        x_t, t, _, _ = student.calls[-1]
        seen.add(round(float(t[0]), 6))
        alpha, sigma = (expand(c, x_t) for c in path.coeffs(t))
        # The flow map of N(1, s^2): (x_t - alpha) / sqrt(alpha^2 s^2 + sigma^2) stays the same.
        end = 1.0 + 0.6 * (x_t - alpha) / (0.36 * alpha**2 + sigma**2).sqrt()
        gain = 0.36 * alpha / (0.36 * alpha**2 + sigma**2)
        error = (1.0 + gain * (x_t - alpha) - end).square().mean()
        assert losses.total.item() == pytest.approx(error.item(), rel=0.12, abs=1e-4)
    assert seen == {round(t, 6) for t in method.rollout.times}


def test_the_warm_start_ends_and_the_fake_is_fitted_through_it() -> None:
    method = make(Plain, VP, warm_start={"updates": 2})
    names = [[phase.loss.__name__ for phase in method.phases(step)] for step in (0, 1, 2)]  # type: ignore[attr-defined]
    assert names == [["warm_loss", "fake_loss"]] * 2 + [["student_loss", "fake_loss"]]
    exact = exact_nets(VP)
    nets = AnalyticNets({r: exact[r] for r in ("student", "teacher")} | {"fake": exact["teacher"]})
    ctx = Ctx(phase="student")
    method.phases(0)[0].loss(nets, batch_of(), ctx)
    losses = fake_loss(method, nets, batch_of(), Ctx(phase="fake", carry=ctx.carry))  # type: ignore[arg-type]
    assert losses.logs["fake"] > 0  # of a sample of its own: the warm start leaves none


def test_the_warm_start_has_a_rate_of_its_own_for_the_student_alone() -> None:
    method = make(Plain, VP, warm_start={"updates": 2, "rate": 6.0})
    rates = {
        r: [method.learning_rate_scale(k, 9, r) for k in range(3)] for r in ("student", "fake")
    }
    assert rates == {"student": [6.0, 6.0, 1.0], "fake": [1.0, 1.0, 1.0]}


@pytest.mark.parametrize("step", range(4))
def test_the_warm_starts_teacher_stops_at_the_students_own_time(step: int) -> None:
    """Three teacher steps pass by 1/2: the student's input there is the teacher's state there."""
    path = FlowPath()
    method = make(Plain, path, num_steps=2, warm_start={"updates": 9, "teacher_steps": 3})
    nets = exact_nets(path)
    method.phases(0)[0].loss(nets, batch_of(), Ctx(step=step, phase="student"))
    ((x_t, t, *_),) = nets["student"].calls  # type: ignore[attr-defined]
    states = {float(call[1][0]): call[0] for call in nets["teacher"].calls}  # type: ignore[attr-defined]
    stops = [1.0, 2 / 3, 1 / 3] if t[0] == 1.0 else [1.0, 2 / 3, 0.5, 1 / 3]
    assert list(states) == pytest.approx(stops)
    assert torch.equal(x_t, states[float(t[0])])


def test_the_warm_start_follows_the_guided_teacher() -> None:
    path = FlowPath()
    leaf, _ = leaf_nets(path)
    teacher = Recorder(GaussianTeacher(path, 0.6))
    nets = AnalyticNets({"student": leaf, "teacher": teacher})
    method = make(Plain, path, guidance=3.0, warm_start={"updates": 1, "teacher_steps": 4})
    method.phases(0)[0].loss(nets, batch_of(), Ctx(phase="student"))
    assert [len(call[0]) for call in teacher.calls] == [2 * BSZ] * 4
    assert not any(call[3] for call in teacher.calls)  # without graph


# ------------------------------------------------------------------------------ EDM's weight
def test_edms_weight_is_that_of_a_network_erring_alike_at_every_noise_level() -> None:
    """On an EDM path lambda c_out^2 = 1, with c_out = sigma sigma_data / sqrt(sigma^2 + s_d^2)."""
    from stepdistill.losses.score import denoising_weight

    path = PATHS["ve"]
    coeffs = path.coeffs(torch.linspace(0.1, 1.0, 9).double())
    weight = denoising_weight("edm", coeffs)
    assert weight is not None
    out = coeffs[1] * 0.5 / (coeffs[1] ** 2 + 0.25).sqrt()
    torch.testing.assert_close(weight * out**2, torch.ones(9).double())
    assert denoising_weight("none", coeffs) is None


def test_edms_weight_counts_in_the_fakes_loss() -> None:
    path = PATHS["ve"]
    fake = Recorder(GaussianTeacher(path, 0.6))
    nets = AnalyticNets({"fake": fake})
    made = torch.zeros(BSZ, 2)
    carry = {"sample": Sample(made, batch_of().cond)}
    method = make(Plain, path, fake_weight="edm")
    loss = fake_loss(method, nets, batch_of(), Ctx(phase="fake", carry=dict(carry))).total  # type: ignore[arg-type]
    x_t, t, cond, _ = fake.calls[-1]
    error = fake.inner(x_t, t, cond).x0.square().mean(1)
    sigma = path.coeffs(t)[1]
    torch.testing.assert_close(loss.double(), (error * (sigma**-2 + 4.0)).mean(), rtol=1e-5, atol=0)


def test_edms_weight_is_of_errors_in_x0_alone() -> None:
    with pytest.raises(ValueError, match="fake_weight: expected none or alpha2 with errors in eps"):
        make(Plain, VP, fake_weight="edm", fake_space="eps")


# --------------------------------------------------------------------------------- gan_alone
def test_gan_alone_needs_a_gan() -> None:
    with pytest.raises(ValueError, match=r"gan_alone: expected gan\.weight_g > 0"):
        DMD2Config(gan_alone=True)
    with pytest.warns(UserWarning, match="guidance 8.0 has no effect"):
        DMD2Config(gan_alone=True, gan={"weight_g": 1e-3}, guidance=8.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [0, 1])
def test_the_warm_start_s_target_is_the_end_of_the_teacher_s_own_steps(
    path: NoisePath, k: int
) -> None:
    """Of a student that answers 0, at either step: its input is the trajectory's state there."""
    options = {"updates": 9, "teacher_steps": 4}
    method = make(Plain, path, num_steps=2, warm_start=options)
    student = Recorder(Leaf(path, torch.zeros(BSZ, 2, dtype=torch.float64)))
    nets = AnalyticNets({"student": student, "teacher": exact_nets(path)["teacher"]})
    step = next(n for n in range(9) if Ctx(step=n, phase="student").shared_randint(0, 2) == k)
    losses = method.phases(step)[0].loss(nets, batch_of(), Ctx(step=step, phase="student"))
    ctx = Ctx(step=step, phase="student")
    ctx.shared_randint(0, 2)
    noise, batch = ctx.randn((BSZ, 2)), batch_of()
    grid = tuple(path.snap(torch.tensor((1.0, 0.75, 0.5, 0.25), dtype=torch.float64)).tolist())
    end = ode_solve(nets["teacher"], noise, batch.cond, times=grid)
    torch.testing.assert_close(losses.total, end.square().mean().to(losses.total))
    there = path.prior(noise)
    if k:
        spec = SamplerSpec(grid[:2], "ode")
        there = sample_x0(nets["teacher"], spec, noise, batch.cond, until=grid[2])
    torch.testing.assert_close(student.calls[-1][0], there.to(student.calls[-1][0]))
