"""disback on Gaussians: the schedule, the targets between student and teacher, and dmd2 inside."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from support.score import PATHS, Affine, Leaf, Recorder, batch_of, closed_form
from torch import Tensor, nn

from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import NoisePath
from stepdistill.core.types import Cond
from stepdistill.methods.disback import DisBack, DisBackConfig
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

# 2 updates of warm start, then 6 that record, then 8 for 3 stored nodes.
LONG = {"nodes": 4, "record_updates": 6, "backtrack_updates": 8, "warm_start": {"updates": 2}}


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def make(path: NoisePath, kind: str = "x0", **config: object) -> DisBack:
    return DisBack(DisBackConfig(**{"guidance": 1.0, **config}), Setting(path, kind))  # type: ignore[arg-type]


# -------------------------------------------------------------------------------- the schedule
def test_the_student_waits_while_the_fake_s_way_is_recorded() -> None:
    method = make(PATHS["flow"], **LONG)
    phases = {step: method.phases(step) for step in range(20)}
    trained = ["+".join(role for p in phases[step] for role in p.trains) for step in phases]
    assert trained == ["student"] * 2 + ["fake"] * 6 + ["student+fake"] * 12
    assert [p.loss for p in phases[1]] == [method.warm_loss]
    assert [(p.name, p.repeat, p.loss) for p in phases[2]] == [("record", 1, method.fake_loss)]
    assert [p.loss for p in phases[8]] == [method.student_loss, method.fake_loss]
    assert phases[8][1].repeat == method.config.critic_steps
    changes = [s for s in range(1, 20) if phases[s] != phases[s - 1]]
    assert method.part_starts == (0, *changes)


def test_nodes_are_recorded_evenly_and_walked_back() -> None:
    method, nets = make(PATHS["flow"], **LONG), AnalyticNets({})
    when = []
    for step in range(20):
        before = len(nets.ema_calls)
        method.after(nets, step)
        when += [(step, *call) for call in nets.ema_calls[before:]]
    # After 6/4, 12/4 and 18/4 of the fake's updates, rounded up.
    assert when == [(3, "node_1", 0.0), (4, "node_2", 0.0), (6, "node_3", 0.0)]
    assert {r for r, role in method.roles().items() if role.ema_of == "fake"} == {
        role for _, role, _ in when
    }
    # 8 updates over nodes 3, 2, 1; the teacher to the end.
    assert [method.config.target(s) for s in range(8, 20)] == [3, 3, 3, 2, 2, 2, 1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("nodes", range(1, 6))
@pytest.mark.parametrize(("record", "back"), [(1, 1), (2, 7), (5, 3)])
def test_every_node_is_recorded_before_it_is_a_target(nodes, record, back) -> None:
    config = DisBackConfig(nodes=nodes, record_updates=record, backtrack_updates=back)
    recorded = [k for step in range(record) for k in config.recorded(step)]
    assert recorded == [*range(1, nodes)]
    assert all(config.recorded(step) == () for step in range(record, 20))
    targets = [config.target(step) for step in range(record, 20)]
    assert targets == sorted(targets, reverse=True)
    assert targets[0] == (nodes - 1 if nodes > 1 else 0)
    assert targets[back] == 0
    assert nodes == 1 or targets[back - 1] > 0


# ----------------------------------------------------------------------------- dmd2 inside it
@pytest.mark.parametrize("kind", ["x0", "flow"])
@pytest.mark.parametrize("step", [0, 2])
def test_no_node_is_dmd2_bit_for_bit(path: NoisePath, kind: str, step: int) -> None:
    options = {"guidance": 1.5, "num_steps": 2, "warm_start": {"updates": 2}}
    made = []
    for method in (
        make(path, kind, nodes=0, **options),
        DMD2(DMD2Config(**options), Setting(path, kind)),  # type: ignore[arg-type]
    ):
        student, fake = Affine(path, torch.eye(2), torch.zeros(2)), GaussianTeacher(path, 0.9)
        teacher, fake = Recorder(GaussianTeacher(path, 0.6)), Recorder(fake)
        nets = AnalyticNets({"student": student, "teacher": teacher, "fake": fake})
        one, other = method.phases(step)
        ctx = Ctx(step=step, phase=one.name)
        one.loss(nets, batch_of(), ctx).total.backward()
        ctx = Ctx(step=step, phase=other.name, carry=ctx.carry)
        losses = other.loss(nets, batch_of(), ctx)
        facts = (one.name, one.trains, one.repeat, other.name, other.trains, other.repeat)
        made.append((facts, method.roles(), method.part_starts))
        made[-1] += (student.weight.grad, losses.total, *fake.calls[-1][:2], teacher.calls[-1][0])
    assert made[0][:3] == made[1][:3]
    assert all(torch.equal(a, b) for a, b in zip(made[0][3:], made[1][3:], strict=True))


# ------------------------------------------------------------------------------- the gradient
STDS = {"teacher": 0.5, "node_1": 0.7, "node_2": 0.9, "fake": 1.2}
STEPS = {"node_2": 3, "node_1": 4, "teacher": 5}  # of nodes 3, record 3, backtrack 2


def gradient(path: NoisePath, step: int, **stds: float) -> tuple[Tensor, DisBack, AnalyticNets]:
    """(on x0, the method, its networks) at a step, by matching without a weight."""
    method = make(path, nodes=3, record_updates=3, backtrack_updates=2, weight="uniform")
    leaf = Leaf(path, torch.linspace(-2.0, 2.0, 128, dtype=torch.float64).view(64, 2))
    laws = {role: GaussianTeacher(path, std) for role, std in {**STDS, **stds}.items()}
    nets = AnalyticNets({"student": leaf, **laws})
    method.phases(step)[0].loss(nets, batch_of(), Ctx(step=step, phase="student")).total.backward()
    assert leaf.x0.grad is not None
    return leaf.x0.grad, method, nets


@pytest.mark.parametrize("target", STEPS)
def test_the_gradient_is_that_towards_the_step_s_own_target(path: NoisePath, target: str) -> None:
    """grad = (fake's mean - the target's mean) / numel, at the update's own noised samples."""
    step = STEPS[target]
    grad, method, nets = gradient(path, step)

    class At(DisBack):  # closed_form draws as at step 0
        def sample(self, nets, batch, ctx):  # type: ignore[no-untyped-def]
            ctx.step = step
            return super().sample(nets, batch, ctx)

    same = At(method.config, method.setting)
    leaf = nets["student"]
    _, (fake, wanted) = closed_form(same, nets, path, leaf, STDS["fake"], STDS[target])  # type: ignore[arg-type]
    torch.testing.assert_close(grad, (fake - wanted).detach() / grad.numel(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("target", STEPS)
def test_nobody_moves_at_the_target_s_own_distribution(path: NoisePath, target: str) -> None:
    grad, *_ = gradient(path, STEPS[target], fake=STDS[target])
    assert torch.equal(grad, torch.zeros_like(grad))


def test_the_last_target_is_the_teacher_bit_for_bit(path: NoisePath) -> None:
    grads = [gradient(path, STEPS["teacher"], **stds)[0] for stds in ({}, {"node_1": 3.0})]
    assert torch.equal(*grads)
    assert not torch.equal(gradient(path, STEPS["node_1"])[0], grads[0])


# ------------------------------------------------------------------------------ the recording
class Moving(AnalyticDenoiser):
    """Denoiser of N(mean, 1) with a mean of its own, which training moves."""

    def __init__(self, path: NoisePath, mean: float) -> None:
        super().__init__(path)
        self.mean = nn.Parameter(torch.full((2,), mean, dtype=torch.float64))

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        law = GaussianTeacher(self.path, 1.0)
        return law.posterior_mean(x_t, t, Cond({"mean": self.mean.expand_as(x_t)}))


class MovingNets(AnalyticNets):
    """Nets whose averages are copies by weight, as a RoleBank's."""

    def __init__(self, roles: Mapping[str, Moving]) -> None:
        super().__init__(roles)
        self.roles = roles

    def ema_update(self, role: str, decay: float) -> None:
        assert decay == 0.0
        self.roles[role].mean.data.copy_(self.roles["fake"].mean.data)


def test_nodes_lie_in_order_between_teacher_and_untrained_student(path: NoisePath) -> None:
    """Each nearer to the student, and the targets walk the same way back."""
    method = make(path, nodes=5, record_updates=20, backtrack_updates=8)
    student = Affine(path, torch.eye(2), torch.full((2,), 4.0))
    roles = {
        role: Moving(path, 0.0) for role in ("teacher", "fake", *map("node_{}".format, "1234"))
    }
    nets = MovingNets({**roles, "student": student})  # type: ignore[dict-item]
    nets.roles = roles
    optimizer = torch.optim.SGD([roles["fake"].mean], lr=0.3)
    for step in method.config.recording:
        (phase,) = method.phases(step)
        optimizer.zero_grad()
        phase.loss(nets, batch_of(), Ctx(step=step, phase=phase.name)).total.backward()
        optimizer.step()
        method.after(nets, step)
    assert student.bias.grad is None
    order = ["teacher", "node_1", "node_2", "node_3", "node_4", "fake"]
    means = [float(roles[role].mean.mean()) for role in order]
    assert means[0] == 0.0
    assert all(b - a > 0.05 for a, b in pairwise(means))
    assert means[-1] < 4.1


# -------------------------------------------------------------------------- what is said early
def test_a_run_too_short_for_the_teacher_is_refused() -> None:
    method = make(PATHS["flow"], **LONG)
    with pytest.raises(ValueError, match=r"disback: expected max_train_steps above 16 .* got 16\."):
        method.check_length(16)
    method.check_length(17)
    make(PATHS["flow"], nodes=0).check_length(1)
    make(PATHS["flow"], nodes=1, record_updates=3).check_length(4)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"nodes": 0, "record_updates": 5}, "record_updates 5 .* nodes 0: it needs 1"),
        ({"nodes": 1, "backtrack_updates": 5}, "backtrack_updates 5 .* nodes 1: it needs 2"),
    ],
)
def test_counts_without_nodes_are_warned_of(options, needed) -> None:
    with pytest.warns(UserWarning, match=needed):
        DisBackConfig(**options)


@pytest.mark.parametrize(
    "options", [{"nodes": 1, "record_updates": 5}, {"nodes": 2, "backtrack_updates": 5}]
)
def test_counts_with_just_enough_nodes_have_their_effect(options, recwarn) -> None:
    DisBackConfig(**options)
    assert not [one for one in recwarn if "has no effect" in str(one.message)]
