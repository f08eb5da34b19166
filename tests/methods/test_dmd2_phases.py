"""dmd2's phases: who is trained, the adversarial term, and the update order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from support.runs import NETWORKS
from support.score import (
    BSZ,
    PATHS,
    VP,
    Leaf,
    LinearHead,
    Net,
    NetDenoiser,
    batch_of,
    fake_loss,
    fake_nets,
    make,
    student_loss,
)
from torch import Tensor, nn

from stepdistill.config.tuning import Tuning
from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, expand
from stepdistill.core.types import Batch, Cond, Losses
from stepdistill.families.experts import Experts
from stepdistill.families.family import Family
from stepdistill.losses.adversarial import generator_loss
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.gan import GANConfig
from stepdistill.methods.rollout import Sample
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.analytic import AnalyticNets


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


# -------------------------------------------------------------------------- who gets gradients
def networks(path: NoisePath, method: DMD2) -> tuple[dict[str, nn.Module], AnalyticNets]:
    modules: dict[str, nn.Module] = {
        role: Net(seed) for seed, role in enumerate(("teacher", "student", "fake"))
    }
    nets = AnalyticNets(
        {role: NetDenoiser(path, net) for role, net in modules.items()},  # type: ignore[arg-type]
        {"disc": LinearHead()},
    )
    modules["disc"] = nets._heads["disc"]
    return modules, nets


def run_phase(method: DMD2, modules: dict[str, nn.Module], index: int, loss: Losses) -> set[str]:
    """Roles with a non-zero gradient; every other parameter must have none at all."""
    loss.total.backward()
    got = set()
    for role, module in modules.items():
        grads = [p.grad for p in module.parameters()]
        if role not in method.phases(0)[index].trains:
            assert all(g is None for g in grads), role
        elif all(g is not None and bool(g.abs().sum() > 0) for g in grads):
            got.add(role)
        module.zero_grad(set_to_none=True)
    return got


def train_only(modules: dict[str, nn.Module], roles: Sequence[str]) -> None:
    for role, module in modules.items():
        module.requires_grad_(role in roles)


@pytest.mark.parametrize("gan", [None, "fake", "teacher"])
def test_each_phase_trains_its_own_roles_and_all_of_them(path: NoisePath, gan: str | None) -> None:
    options = {} if gan is None else {"gan": {"weight_g": 1.0, "source": gan}}
    method = make(path, **options)
    modules, nets = networks(path, method)
    batch, ctx = batch_of(x0=torch.randn(BSZ, 2)), Ctx(phase="student")
    train_only(modules, ("student",))
    assert run_phase(method, modules, 0, student_loss(method, nets, batch, ctx)) == {"student"}
    fake_ctx = Ctx(phase="fake", carry=ctx.carry)
    trained = method.phases(0)[1].trains
    train_only(modules, trained)
    assert run_phase(method, modules, 1, fake_loss(method, nets, batch, fake_ctx)) == set(trained)
    assert set(trained) == ({"fake"} if gan is None else {"fake", "disc"})


def test_the_student_phase_spares_the_other_roles_even_unfrozen() -> None:
    """Without a GAN the gradient needs no freezing: teacher and fake ran without grad."""
    method = make(VP)
    modules, nets = networks(VP, method)
    student_loss(method, nets, batch_of()).total.backward()
    assert all(p.grad is None for r in ("teacher", "fake") for p in modules[r].parameters())


def test_gan_gradient_reaches_the_student_through_frozen_features() -> None:
    """With no distribution-matching gradient left, only the head can move the student."""
    method = make(FlowPath(), gan={"weight_g": 0.5})
    modules, nets = networks(FlowPath(), method)
    modules["fake"].load_state_dict(modules["teacher"].state_dict())
    train_only(modules, ("student",))
    losses = student_loss(method, nets, batch_of(x0=torch.randn(BSZ, 2)))
    assert losses.logs["dm"].item() == 0.0
    assert losses.total.item() == pytest.approx(0.5 * losses.logs["gan_g"].item())
    assert run_phase(method, modules, 0, losses) == {"student"}


def test_gan_alone_is_the_generators_loss_without_a_score() -> None:
    """No teacher is called, nor the fake but for the head's features."""
    method = make(FlowPath(), gan={"weight_g": 0.5}, gan_alone=True)
    modules, nets = networks(FlowPath(), method)
    del nets._denoisers["teacher"]
    train_only(modules, ("student",))
    batch, replay = batch_of(x0=torch.randn(BSZ, 2)), Ctx(phase="student")
    losses = student_loss(method, nets, batch)
    sample = method.sample(nets, batch, replay)
    logits = method.student_logits(nets, batch, replay, sample, None)
    assert losses.total.item() == 0.5 * generator_loss(logits).item()
    assert set(losses.logs) == {"gan_g"}
    assert run_phase(method, modules, 0, losses) == {"student"}


@pytest.mark.parametrize("source", ["fake", "teacher"])
def test_the_critics_denoiser_learns_from_the_head_only_as_its_source(source: str) -> None:
    method = make(FlowPath(), gan={"weight_g": 1.0, "source": source, "weight_d": 1.0})
    without = make(FlowPath(), order="exclusive")
    grads = []
    for one in (method, without):
        modules, nets = networks(FlowPath(), one)
        train_only(modules, ("fake", "disc"))
        ctx = Ctx(phase="fake", repeat=1)
        fake_loss(one, nets, batch_of(x0=torch.randn(BSZ, 2)), ctx).total.backward()
        grads.append(modules["fake"].into.grad)
    assert torch.equal(*grads) == (source == "teacher")


def test_identical_real_and_fake_samples_give_two_log_two_at_logit_zero() -> None:
    method = make(VP, gan={"weight_g": 1.0, "same_noise": True, "r1_weight": 100.0})
    modules, nets = networks(VP, method)
    x0 = torch.randn(BSZ, 2)
    ctx = Ctx(carry={"sample": Sample(x0, batch_of().cond)})
    logs = fake_loss(method, nets, batch_of(x0=x0), ctx).logs
    assert logs["logit_real"] == logs["logit_fake"]
    assert logs["r1"] > 0.0
    modules["disc"].weight.data.zero_()
    losses = fake_loss(method, nets, batch_of(x0=x0), Ctx(carry=ctx.carry))
    assert losses.logs["gan_d"].item() == pytest.approx(2 * 0.6931472)
    assert losses.total.item() == pytest.approx(losses.logs["fake"].item() + 0.01 * 2 * 0.6931472)


def test_real_and_fake_samples_get_noise_of_their_own_unless_told() -> None:
    method = make(VP, gan={"weight_g": 1.0})
    _, nets = networks(VP, method)
    x0 = torch.randn(BSZ, 2)
    ctx = Ctx(carry={"sample": Sample(x0, batch_of().cond)})
    logs = fake_loss(method, nets, batch_of(x0=x0), ctx).logs
    assert logs["logit_real"] != logs["logit_fake"]


def test_r1_weight_counts_inside_the_discriminator_weight() -> None:
    totals = []
    for weight in (0.0, 50.0):
        method = make(VP, gan={"weight_g": 1.0, "weight_d": 0.5, "r1_weight": weight})
        _, nets = networks(VP, method)
        ctx = Ctx(carry={"sample": Sample(torch.zeros(BSZ, 2), batch_of().cond)})
        totals.append(fake_loss(method, nets, batch_of(x0=torch.ones(BSZ, 2)), ctx))
    gap = totals[1].total - totals[0].total
    assert gap.item() == pytest.approx(0.5 * 50.0 * totals[1].logs["r1"].item(), rel=1e-3)


def test_exact_r1_is_the_limit_of_the_approximate_one() -> None:
    """On a head linear in the features, a perturbation of std s is worth s^2 times the slope^2."""
    found = {}
    for kind in ("approximate", "exact"):
        gan = {"weight_g": 1.0, "r1_weight": 1.0, "r1": kind, "r1_noise": 0.01}
        method = make(VP, gan=gan)
        modules, nets = networks(VP, method)
        ctx = Ctx(carry={"sample": Sample(torch.zeros(BSZ, 2), batch_of().cond)})
        losses = fake_loss(method, nets, batch_of(x0=torch.ones(BSZ, 2)), ctx)
        losses.total.backward()
        found[kind] = float(losses.logs["r1"])
        assert modules["disc"].weight.grad.abs().max() > 0
    assert found["approximate"] == pytest.approx(1e-4 * found["exact"], rel=0.5)


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_sample_weights_scale_the_gradient_of_their_sample(factor: float) -> None:
    """The seam other divergences use: factor 1 leaves DMD's gradient as it is, bit for bit."""

    class Weighted(DMD2):
        def sample_weights(self, ctx: Ctx, t: Tensor, logits: Tensor) -> Tensor:
            return torch.tensor([1.0, factor]).repeat(BSZ // 2)

    grads, x0 = [], torch.randn(BSZ, 2, generator=torch.Generator().manual_seed(0))
    for cls in (DMD2, Weighted):
        config = DMD2Config(guidance=1.0, gan=GANConfig(weight_g=1e-30))
        method = cls(config, Setting(VP, "x0"))
        _, base = networks(VP, method)
        student = Leaf(VP, x0.clone())
        roles = {"student": student, "teacher": base["teacher"], "fake": base["fake"]}
        nets = AnalyticNets(roles, base._heads)
        student_loss(method, nets, batch_of(x0=x0)).total.backward()
        grads.append(student.x0.grad)
    assert torch.equal(grads[0][::2], grads[1][::2])
    torch.testing.assert_close(factor * grads[0][1::2], grads[1][1::2], rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------- update order
@pytest.mark.parametrize("order", ["critic_always", "exclusive"])
def test_both_orders_make_critic_steps_fake_updates_per_student_update(order: str) -> None:
    phases = make(VP, order=order, critic_steps=7).phases(0)
    assert [(p.name, p.repeat) for p in phases] == [("student", 1), ("fake", 7)]


def test_critic_always_reuses_the_students_sample_with_its_own_condition() -> None:
    method = make(FlowPath())
    student, fake, nets = fake_nets(FlowPath())
    ctx, first = Ctx(phase="student"), batch_of()
    student_loss(method, nets, first, ctx)
    x0 = ctx.carry["sample"].x0  # type: ignore[attr-defined]
    assert not x0.requires_grad
    calls = len(student.calls)
    later = Batch(Cond({"mean": first.cond["mean"] + 100.0}), first.null, (2,))
    fake_ctx = Ctx(phase="fake", carry=ctx.carry)
    fake_loss(method, nets, later, fake_ctx)
    x_t, t, seen, _ = fake.calls[-1]
    assert len(student.calls) == calls  # no new sample
    assert torch.equal(seen["mean"], first.cond["mean"])
    noise = (x_t - expand(1.0 - t, x_t) * x0) / expand(t, x_t)
    replay = Ctx(phase="fake")
    replay.stratified(BSZ)
    torch.testing.assert_close(noise, replay.randn((BSZ, 2)), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("order", "repeat"), [("critic_always", 1), ("exclusive", 0)])
def test_other_fake_updates_draw_a_new_sample_without_graph(order: str, repeat: int) -> None:
    method = make(FlowPath(), order=order)
    student, fake, nets = fake_nets(FlowPath())
    ctx = Ctx(phase="student")
    student_loss(method, nets, batch_of(), ctx)
    later = Batch(Cond({"mean": batch_of().cond["mean"] + 100.0}), batch_of().null, (2,))
    fake_loss(method, nets, later, Ctx(phase="fake", repeat=repeat, carry=ctx.carry))
    assert len(student.calls) == 2
    assert not student.calls[1][3]
    assert not torch.equal(student.calls[0][0], student.calls[1][0])
    assert torch.equal(fake.calls[-1][2]["mean"], later.cond["mean"])


def test_the_fake_is_never_guided() -> None:
    method = make(FlowPath(), guidance=8.0)
    _, fake, nets = fake_nets(FlowPath())
    ctx = Ctx(phase="student")
    student_loss(method, nets, batch_of(), ctx)
    fake_loss(method, nets, batch_of(), Ctx(phase="fake", carry=ctx.carry))
    assert [call[0].shape[0] for call in fake.calls] == [BSZ, BSZ]  # no doubled batch


# -------------------------------------------------------------------------------- real networks
def bank_of(family: Family, method: DMD2, layout: str) -> RoleBank:
    return RoleBank(family, method.roles(), Tuning(student=layout, fake=layout, rank=2))


def real_batch(family: Family) -> Batch:
    prompts = [0, 1] if family.conditioning == "label" else ["one", "two"]
    shape = family.sample_shape()
    x0 = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0))
    return Batch(family.encode(prompts), family.null(2), shape, x0)


def method_for(family: Family, **config: object) -> DMD2:
    return DMD2(DMD2Config(guidance=1.0, student_times=(0.4,), **config), family.setting)


def role_grads(bank: RoleBank) -> dict[str, list[Tensor]]:
    return {
        role: [p.grad for p in bank.members(role).values() if p.grad is not None]
        for role in bank.roles
    }


@pytest.mark.sampled(pairs=False, family=NETWORKS)
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize("layout", ["lora", "full"])
@pytest.mark.parametrize("source", ["fake", "teacher"])
def test_gan_phases_of_real_networks_reach_their_roles_only(
    family: Family, layout: str, source: str
) -> None:
    method = method_for(family, gan={"weight_g": 1.0, "source": source})
    if isinstance(family.net, Experts):
        with pytest.raises(ValueError, match=r"expected feature blocks of .* \(\), got"):
            bank_of(family, method, layout)
        return
    bank, batch, ctx = bank_of(family, method, layout), real_batch(family), Ctx(phase="student")
    for index, phase in enumerate(method.phases(0)):
        bank.train_only(phase.trains)
        bank.zero_grad(set_to_none=True)
        loss = method.phases(0)[index].loss(bank, batch, Ctx(phase=phase.name, carry=ctx.carry))
        loss.total.backward()
        got = {
            role
            for role, grads in role_grads(bank).items()
            if any(bool(grad.abs().sum() > 0) for grad in grads)
        }
        assert got == set(phase.trains)


@pytest.mark.sampled(pairs=False, family=NETWORKS)
@pytest.mark.sampled_in_full(pairs=False)
@pytest.mark.parametrize("layout", ["lora", "full"])
def test_a_fresh_fake_is_the_teacher_so_the_first_gradient_is_zero(
    family: Family, layout: str
) -> None:
    method = method_for(family)
    bank = bank_of(family, method, layout)
    bank.train_only(("student",))
    assert student_loss(method, bank, real_batch(family)).total.item() == 0.0


@pytest.mark.full
def test_checkpointing_leaves_the_students_gan_gradient_unchanged(
    make_family: Callable[[str], Family],
) -> None:
    """The fake's adapter runs between the student's forward and its recomputed backward."""
    grads = []
    for checkpointing in (False, True):
        family = make_family("sd_v")
        method = method_for(family, gan={"weight_g": 1.0})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            bank = bank_of(family, method, "lora")
            for role in ("student", "fake"):
                for param in bank.members(role).values():
                    param.data.normal_(0.0, 0.1)
        if checkpointing:
            bank.enable_gradient_checkpointing()
            bank.train()
        bank.train_only(("student",))
        student_loss(method, bank, real_batch(family)).total.backward()
        grads.append(torch.cat([grad.flatten() for grad in role_grads(bank)["student"]]))
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-7)
