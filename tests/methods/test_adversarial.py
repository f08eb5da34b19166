"""ladd and add on Gaussian teachers: gradients in closed form, laws of steps and times, what heads
are shown, and where else the same heads serve."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from support.jumps import FLOW, VP, Ctx64, Linear, batch
from support.score import PATHS, Affine, Leaf, Recorder, batch_of
from torch import Tensor, nn

from stepdistill.config.run import RunConfig
from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import NoisePath, expand
from stepdistill.losses.adversarial import discriminator_loss, exact_r1
from stepdistill.losses.score import dmd_gradient
from stepdistill.methods import METHODS
from stepdistill.methods.add import ADD, ADDConfig
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.f_distill import FDistillConfig
from stepdistill.methods.gan import GANConfig, disc_loss, noised_disc_loss
from stepdistill.methods.ladd import LADD, LADDConfig
from stepdistill.methods.meanflow import SCM, MeanFlow, MeanFlowConfig
from stepdistill.methods.rollout import Sample
from stepdistill.methods.scott import SCott, SCottConfig
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
B, STD = 8, 0.6


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


class Pixels:
    """A pixel network whose one block is the image; remembers what it saw."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def features(self, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        self.seen.append(images)
        return dict.fromkeys(names, images)

    def __call__(self, images: Tensor, by: object) -> Tensor:
        return images.flatten(1).mean(1)


class Mid(nn.Module):
    """A head of the one feature that there is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.net(features["mid"].float())


def student_of(path: NoisePath, dim: int = 2) -> Leaf:
    x0 = torch.linspace(-1.0, 1.5, B * dim, dtype=torch.float64).view(B, dim)
    return Leaf(path, x0)


def nets_of(path: NoisePath, student: object, pixels: Pixels | None = None) -> AnalyticNets:
    teacher = Recorder(GaussianTeacher(path, STD))
    scorers = {} if pixels is None else {"pixels": pixels}
    return AnalyticNets({"student": student, "teacher": teacher}, {"disc": Linear()}, scorers)


def ladd(path: NoisePath, **config: object) -> LADD:
    return LADD(LADDConfig(**{"num_steps": 1, **config}), Setting(path, "x0"))  # type: ignore[arg-type]


def add(path: NoisePath, **config: object) -> ADD:
    return ADD(ADDConfig(**{"num_steps": 1, "guidance": 2.0, **config}), Setting(path, "x0"))  # type: ignore[arg-type]


def data_of(bsz: int = B) -> object:
    return batch_of(bsz, x0=torch.randn(bsz, 2, generator=torch.Generator().manual_seed(3)))


# ------------------------------------------------------------------------------- ladd's gradient
@pytest.mark.parametrize("mean", [1.0, None])
def test_the_student_follows_the_heads_through_the_teacher_s_features(path, mean) -> None:
    """The head is twice the mean of x_t, so hinge's -logit has the gradient -2 alpha / (B D)."""
    method = ladd(path, gan={"weight_g": 3.0, "time_mean": mean})
    student = student_of(path)
    nets, batch = nets_of(path, student), data_of()
    student_phase, disc_phase = method.phases(0)
    losses = student_phase.loss(nets, batch, ctx := Ctx64(seed=5))
    losses.total.backward()
    again = Ctx64(seed=5)
    method.sample(nets, batch, again)
    gan = method.config.gan
    t = method.noise_times(again, B) if mean is None else gan.law(path, again, B)
    alpha, _ = path.coeffs(t)
    expected = expand(alpha, student.x0) * (-3.0 * 2.0 / (B * 2)) * torch.ones_like(student.x0)
    torch.testing.assert_close(student.x0.grad, expected, rtol=1e-6, atol=0)
    assert nets["teacher"].calls[-1][3], "the call has a graph"
    assert [phase.trains for phase in (student_phase, disc_phase)] == [("student",), ("disc",)]
    assert set(losses.logs) == {"gan_g"}
    assert torch.equal(ctx.carry["sample"].x0, student.x0)


def test_the_head_is_told_the_sample_that_the_student_made_then_new_ones() -> None:
    method = ladd(FLOW, disc_steps=3, num_steps=4)
    student = Recorder(student_of(FLOW))
    nets, batch, ctx = nets_of(FLOW, student), data_of(), Ctx64(seed=5)
    first, disc = method.phases(0)
    assert (disc.repeat, disc.reads_x0, first.reads_real) == (3, True, False)
    first.loss(nets, batch, ctx)
    calls = len(student.calls)
    for repeat, more in ((0, 0), (1, 1), (2, 2)):
        losses = disc.loss(nets, batch, Ctx64(seed=5, phase="disc", repeat=repeat, carry=ctx.carry))
        assert len(student.calls) == calls + more
        assert losses.total.requires_grad
        assert not student.calls[-1][3] or repeat == 0
    assert {"gan_d", "logit_real", "logit_fake"} == set(losses.logs)
    assert ladd(FLOW, rollout="simulate").needs == {"cond", "real"}
    assert ladd(FLOW).needs == {"cond", "x0", "real"}


def test_steps_follow_their_law() -> None:
    """Step 0 with its own chance, the others alike; at first the less noisy half alone."""
    law = {"num_steps": 4, "noisiest_share": 0.7, "clean_first": 500}
    method = ladd(FLOW, **law)
    drawn = Counter(method.draw_step(Ctx(seed=s, step=500)) for s in range(2000))
    assert drawn[0] / 2000 == pytest.approx(0.7, abs=5 * (0.21 / 2000) ** 0.5)
    for k in (1, 2, 3):
        assert drawn[k] / 2000 == pytest.approx(0.1, abs=5 * (0.09 / 2000) ** 0.5)
    assert {method.draw_step(Ctx(seed=s, step=499)) for s in range(50)} == {2, 3}
    even = Counter(ladd(FLOW, num_steps=4).draw_step(Ctx(seed=s)) for s in range(400))
    assert min(even.values()) > 60
    assert {ladd(FLOW, **{**law, "num_steps": 1}).draw_step(Ctx(seed=s)) for s in range(9)} == {0}
    with pytest.warns(UserWarning, match="noisiest_share, clean_first has no effect"):
        last = ladd(FLOW, **law, trained_step="last")
    assert {last.draw_step(Ctx(seed=s, step=9)) for s in range(9)} == {3}


@pytest.mark.parametrize("make", [ladd, add])
def test_a_student_may_begin_on_the_teacher_s_trajectories(make) -> None:
    """By the loss of score distillation's start, alone; what counts from the first update on counts
    from its end then."""
    start = {"updates": 2, "teacher_steps": 4, "rate": 6.0}
    options = {"num_steps": 4, "warm_start": start}
    method, nets, batch = make(FLOW, **options), nets_of(FLOW, student_of(FLOW)), data_of()
    scored = DMD2(DMD2Config(**options, guidance=2.0 if make is add else 1.0), Setting(FLOW, "x0"))
    (phase,) = method.phases(1)
    losses = phase.loss(nets, batch, Ctx(seed=3, step=1, phase="student"))
    other = scored.phases(1)[0].loss(nets, batch, Ctx(seed=3, step=1, phase="student"))
    assert float(losses.total) == float(other.total) > 0
    assert set(losses.logs) == {"warm_start"}
    assert (phase.trains, phase.reads_x0, phase.reads_real) == (("student",), False, False)
    assert [one.name for one in method.phases(2)] == ["student", "disc"]
    assert method.part_starts == (0, 2)
    scales = [method.learning_rate_scale(k, 9, "student") for k in range(3)]
    assert scales == [6.0, 6.0, 1.0]
    assert method.learning_rate_scale(0, 9, "disc") == 1.0
    clean = make(FLOW, **options, clean_first=3)
    drawn = [{clean.draw_step(Ctx(seed=s, step=k)) for s in range(50)} for k in (4, 5)]
    assert drawn == [{2, 3}, {0, 1, 2, 3}]


def test_levels_are_logit_normal_on_every_path(path) -> None:
    gan = GANConfig(time_mean=1.0, time_std=0.5)
    t = gan.law(path, Ctx(), 4096)
    alpha, sigma = path.coeffs(t)
    log = (sigma / alpha).log()
    assert float(log.median()) == pytest.approx(1.0, abs=0.05)
    low, high = log.quantile(torch.tensor([0.16, 0.84], dtype=torch.float64))
    assert float(high - low) == pytest.approx(1.0, abs=0.1)
    assert GANConfig().law(path, Ctx(), 4) is None


@pytest.mark.full
def test_heads_alone_bring_a_student_to_the_data() -> None:
    """An affine student of one step to N((1, -0.5), diag(1, 0.25)), by an MLP on x_t."""
    torch.manual_seed(0)
    student = Affine(FLOW, 0.3 * torch.eye(2), torch.zeros(2))
    hidden = nn.Sequential(nn.Linear(2, 32), nn.SiLU(), nn.Linear(32, 1))
    nets = AnalyticNets(
        {"student": student, "teacher": GaussianTeacher(FLOW, 1.0)},
        {"disc": Mid(hidden)},
    )
    method, scale = ladd(FLOW), torch.tensor([1.0, 0.5])
    weights = {"student": [student.weight, student.bias], "disc": [*hidden.parameters()]}
    adams = {
        role: torch.optim.Adam(params, lr=rate, betas=(0.0, 0.99))
        for (role, params), rate in zip(weights.items(), (2e-2, 1e-2), strict=True)
    }
    ends = []
    for step in range(300):
        noise = torch.randn(128, 2, generator=torch.Generator().manual_seed(step))
        batch, carry = batch_of(128, x0=noise * scale + torch.tensor([1.0, -0.5])), {}
        for phase in method.phases(step):
            adams[phase.trains[0]].zero_grad()
            ctx = Ctx(step=step, phase=phase.name, carry=carry)
            phase.loss(nets, batch, ctx).total.backward()
            adams[phase.trains[0]].step()
        ends.append(torch.cat([student.bias.detach(), student.weight.detach().norm().view(1)]))
    mean, other, size = torch.stack(ends[-150:]).mean(0).tolist()
    assert (mean, other) == (pytest.approx(1.0, abs=0.25), pytest.approx(-0.5, abs=0.25))
    assert size == pytest.approx(1.25**0.5, abs=0.3)


# ----------------------------------------------------------------------------- what heads are shown
def test_equal_samples_can_t_be_told_apart() -> None:
    """With one noise for both sides the loss is at least 2 log 2 (softplus), 2 (hinge) at any head,
    and that at logit 0."""
    nets, x0 = nets_of(FLOW, None), torch.randn(B, 2, dtype=torch.float64)
    same = Sample(x0, batch_of(B).cond)
    t = torch.linspace(0.1, 0.9, B, dtype=torch.float64)
    for loss, least in (("softplus", 2 * math.log(2)), ("hinge", 2.0)):
        gan = GANConfig(weight_g=1.0, source="teacher", same_noise=True, loss=loss)
        args = (gan, Ctx64(seed=1), FLOW, same, same, lambda: t)
        assert float(disc_loss(nets, *args)[0]) >= least
        nets._heads["disc"].w.data.zero_()
        assert float(disc_loss(nets, *args)[0]) == pytest.approx(least)
        nets._heads["disc"].w.data.fill_(2.0)


def test_times_may_be_shared_without_the_noise() -> None:
    nets, x0 = nets_of(FLOW, None), torch.randn(B, 2, dtype=torch.float64)
    sample, seen = Sample(x0, batch_of(B).cond), nets["teacher"].calls
    for shared in (True, False):
        ctx, gan = Ctx64(seed=1), GANConfig(weight_g=1.0, source="teacher")
        disc_loss(nets, gan, ctx, FLOW, sample, sample, lambda: ctx.rand(B), shared)  # noqa: B023
        (fake, t_fake, *_), (real, t_real, *_) = seen[-2:]
        assert torch.equal(t_fake, t_real) == shared
        assert not torch.equal(fake, real)


@pytest.mark.parametrize("bsz", [1, 4])
def test_real_samples_under_their_neighbour_s_prompt_are_fakes(bsz) -> None:
    nets, cond = nets_of(FLOW, None), batch_of(bsz).cond
    real, fake = (torch.randn(bsz, 2, dtype=torch.float64) for _ in range(2))
    t_real, t_fake = torch.rand(bsz).double(), torch.rand(bsz).double()
    gan = GANConfig(weight_g=1.0, source="teacher", loss="hinge", mismatched=True)
    total, _ = noised_disc_loss(nets, gan, Ctx(), (real, t_real, cond), (fake, t_fake, cond))
    x, t, conds, _ = nets["teacher"].calls[0]
    if bsz == 1:
        assert torch.equal(x, fake)
    else:
        assert torch.equal(x, torch.cat([fake, real.roll(1, 0)]))
        assert torch.equal(t, torch.cat([t_fake, t_real.roll(1, 0)]))
        assert torch.equal(conds["mean"], torch.cat([cond["mean"], cond["mean"]]))
    head = nets._heads["disc"]
    expected = discriminator_loss(head({"mid": real}), head({"mid": x}), "hinge")
    assert float(total) == pytest.approx(float(expected))


def test_r1_of_features_needs_no_derivative_of_their_network() -> None:
    """The head w * mean of D numbers: w^2 / D each, whatever made them."""
    nets, cond = nets_of(FLOW, None), batch_of(4).cond
    x, t = torch.randn(4, 2, dtype=torch.float64), torch.rand(4).double()
    gan = GANConfig(weight_g=1.0, source="teacher", r1="features", r1_weight=0.5)
    total, logs = noised_disc_loss(nets, gan, Ctx(), (x, t, cond), (x, t, cond))
    assert float(logs["r1"]) == pytest.approx(4.0 / 2)
    plain, _ = noised_disc_loss(
        nets, gan.model_copy(update={"r1_weight": 0.0}), Ctx(), (x, t, cond), (x, t, cond)
    )
    assert float(total - plain) == pytest.approx(0.5 * 2.0)
    (slope,) = torch.autograd.grad(total - plain, nets._heads["disc"].w)
    assert float(slope) == pytest.approx(0.5 * 2 * 2.0 / 2)
    # Several heads, each on an input of its own: the mean of both.
    one, two = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    logits = torch.stack([one.sum(1), 2 * two.sum(1)], 1)
    assert float(exact_r1(logits, [one, two])) == pytest.approx((3 + 4 * 3) / 2)


# -------------------------------------------------------------------------------- add's gradient
@pytest.mark.parametrize("weight", ["alpha", "sds"])
def test_distillation_moves_the_sample_to_what_the_teacher_makes_of_it(path, weight) -> None:
    """2 c (x0 - y) / (B D), y without a gradient; with sds c is VSD's weight of a difference."""
    method = add(path, distillation_weight=weight, gan={"weight_g": 1e-30})
    student, pixels = student_of(path), Pixels()
    nets, batch = nets_of(path, student, pixels), data_of()
    losses = method.phases(0)[0].loss(nets, batch, Ctx64(seed=5))
    losses.total.backward()
    again = Ctx64(seed=5)
    method.sample(nets, batch, again)
    t = method.noise_times(again, B)
    x0 = student.x0.detach()
    x_t = path.add_noise(x0, again.randn((B, 2)), t)
    y = GaussianTeacher(path, STD)(x_t, t, batch.cond, batch.null, 2.0).x0
    alpha, sigma = path.coeffs(t)
    c = alpha if weight == "alpha" else alpha * sigma
    expected = 2.5 * 2.0 * expand(c, x0) * (x0 - y) / (B * 2)
    torch.testing.assert_close(student.x0.grad, expected, rtol=1e-5, atol=1e-9)
    if weight == "sds":
        vsd = dmd_gradient(x0, y, x0, "sigma2", (alpha, sigma))
        torch.testing.assert_close(expected, 5.0 * vsd / (B * 2), rtol=1e-5, atol=1e-9)
    assert not nets["teacher"].calls[-1][3], "the teacher is called without a graph"
    error = float(losses.logs["distillation"])
    assert error == pytest.approx(float((c * (x0 - y).square().mean(1)).mean()), rel=1e-6)


def test_heads_on_pixels_see_images_without_noise() -> None:
    method, pixels = add(FLOW, distillation=1e-30, gan={"weight_g": 3.0}), Pixels()
    student = student_of(FLOW)
    nets, batch, ctx = nets_of(FLOW, student, pixels), data_of(), Ctx64(seed=5)
    first, disc = method.phases(0)
    first.loss(nets, batch, ctx).total.backward()
    expected = torch.full_like(student.x0, -3.0 * 2.0 / (B * 2))
    torch.testing.assert_close(student.x0.grad, expected, rtol=1e-6, atol=1e-12)
    assert torch.equal(pixels.seen[-1], student.x0)
    calls = len(nets["teacher"].calls)
    losses = disc.loss(nets, batch, ctx)
    real, fake = batch.x0, student.x0.detach()
    assert [*map(torch.equal, pixels.seen[-2:], (fake, real))] == [True, True]
    assert len(nets["teacher"].calls) == calls, "the teacher has no part in it"
    head = nets._heads["disc"]
    judged = discriminator_loss(head({"mid": real.double()}), head({"mid": fake}), "hinge")
    assert float(losses.total) == pytest.approx(float(judged) + 1e-5 * 2.0)
    assert set(method.scorers()) == {"pixels"}
    assert method.roles()["disc"].reads == "pixels"
    assert ladd(FLOW).scorers() == {}


# --------------------------------------------------------------------- the same heads beside others
def meanflow(path: NoisePath = FLOW, **config: object) -> MeanFlow:
    config = {"guidance": 1.0, **SCM, **config}
    return MeanFlow(MeanFlowConfig(**config), Setting(path, "flow"))  # type: ignore[arg-type]


HEADS = {"weight_g": 0.5, "weight_d": 0.5, "source": "teacher", "loss": "hinge"}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_residual_carries_heads_on_a_second_call_of_the_student(share) -> None:
    """SANA-Sprint's: from pure noise in that share of the samples, at the first time."""
    student = Recorder(GaussianTeacher(FLOW, 0.4))
    nets = AnalyticNets(
        {"student": student, "teacher": Recorder(GaussianTeacher(FLOW, STD))}, {"disc": Linear()}
    )
    method, alone = meanflow(gan=HEADS, pure_noise=share), meanflow()
    data = batch(256, std=STD)
    first, disc = method.phases(0)
    losses = first.loss(nets, data, ctx := Ctx64(seed=2))
    x_t, t, *_ = student.calls[-1]
    assert float((t == 1.0).double().mean()) == pytest.approx(share, abs=0.15)
    # Where the input is pure noise it has no mean, else that of (1 - t) x0.
    gap = x_t.flatten(1).mean(1) - 0.7 * (1 - t)
    assert float(gap.mean().abs()) < 0.1
    base = alone.phases(0)[0].loss(nets, data, Ctx64(seed=2)).total
    torch.testing.assert_close(losses.total, base + 0.5 * losses.logs["gan_g"], rtol=1e-6, atol=0)
    assert disc.trains == ("disc",)
    made = nets["student"](x_t, t, data.cond).x0
    assert torch.equal(ctx.carry["sample"].x0, made)
    disc.loss(nets, data, ctx)
    assert [phase.name for phase in alone.phases(0)] == ["student"]
    assert method.needs == {"cond", "x0", "real"}
    assert set(method.roles()) == {"student", "teacher", "disc"}
    assert method.fake_fit is None


def test_heads_judge_the_end_of_a_student_of_phases() -> None:
    student = Recorder(GaussianTeacher(FLOW, 0.4))
    nets = AnalyticNets(
        {"student": student, "teacher": GaussianTeacher(FLOW, STD)}, {"disc": Linear()}
    )
    method = meanflow(r="phases", sampler="ode", num_steps=2, gan=HEADS)
    method.phases(0)[0].loss(nets, batch(8, std=STD), Ctx64(seed=2))
    assert [float(t[0]) for _, t, *_ in student.calls[-2:]] == [1.0, 0.5]
    assert [graph for *_, graph in student.calls[-2:]] == [False, True]


def test_rcm_s_head_stays_with_its_fake() -> None:
    method = meanflow(matching=1.0, gan={"weight_g": 0.1})
    assert [phase.trains for phase in method.phases(0)] == [("student",), ("fake", "disc")]


@pytest.mark.parametrize("name", ["dmd2", "scott"])
def test_other_methods_take_a_pixel_network_and_a_law_of_times(name) -> None:
    pixels, gan = Pixels(), {"weight_g": 1.0, "source": "pixels"}
    student = GaussianTeacher(FLOW, 0.4)
    roles = {"student": student, "teacher": Recorder(GaussianTeacher(FLOW, STD)), "fake": student}
    nets = AnalyticNets({**roles, "target": student}, {"disc": Linear()}, {"pixels": pixels})
    data, made = batch(8, std=STD), {}
    law = {**gan, "source": "teacher", "time_mean": 1.0}
    for kind, options in (("pixels", gan), ("law", law)):
        if name == "dmd2":
            method = DMD2(DMD2Config(guidance=1.0, gan=options), Setting(FLOW, "x0"))
        else:
            config = SCottConfig(guidance_range=(1.0, 1.0), eta=0.0, gan=options)
            method = SCott(config, Setting(FLOW, "x0"))
        ctx = Ctx64(seed=2)
        for phase in method.phases(0)[:2]:
            made[kind] = phase.loss(nets, data, ctx)
        assert set(method.scorers()) == ({"pixels"} if kind == "pixels" else set())
    assert len(pixels.seen) == 3
    assert torch.equal(pixels.seen[-1], data.x0)
    _, t, *_ = nets["teacher"].calls[-1]
    odds = (t / (1 - t)).log()
    assert float(odds.mean()) == pytest.approx(1.0, abs=0.6)


# ------------------------------------------------------------------------------------- bad options
@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (LADDConfig, {"gan": {"weight_g": 0.0}}, "greater than 0"),
        (LADDConfig, {"gan": {"source": "fake"}}, "'teacher' or 'pixels'"),
        (LADDConfig, {"noisiest_share": 1.5}, "less than or equal to 1"),
        (LADDConfig, {"rollout": "pure_noise"}, "rollout: expected simulate or data"),
        (ADDConfig, {"gan": {"mismatched": True}}, "mismatched: expected false with source pixels"),
        (ADDConfig, {"distillation": 0.0}, "greater than 0"),
        (FDistillConfig, {"gan": {"weight_g": 1.0, "source": "pixels"}}, "head that sees noised"),
        (FDistillConfig, {"gan": {"weight_g": 1.0, "mismatched": True}}, "head that sees noised"),
        (MeanFlowConfig, {"gan": {"weight_g": 1.0}}, "gan.source: expected teacher or pixels"),
        (MeanFlowConfig, {"r": "general", "gan": HEADS}, "weight_g 0 with r general"),
    ],
)
def test_options_that_can_t_be_are_refused(config, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_options_without_effect_say_so() -> None:
    with pytest.warns(UserWarning, match="time_mean, same_times has no effect: a pixel network"):
        ADDConfig(gan={"time_mean": 1.0, "same_times": True})
    with pytest.warns(UserWarning, match="pure_noise has no effect"):
        MeanFlowConfig(pure_noise=0.2)


@pytest.mark.parametrize("name", ["ladd", "add", "sana_sprint"])
def test_shipped_configs_are_valid(name) -> None:
    raw = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="model", **raw)
    cls = METHODS[run.method]
    for setting in (Setting(FLOW, "flow", 3.0), Setting(VP, "v")):
        method = cls(cls.Config(**run.method_config), setting)
        assert [phase.trains[-1] for phase in method.phases(0)] == ["student", "disc"]
        assert method.sampler().kind == "renoise"
