"""SCott: consistency's own loss inside, and the head's part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from support.jumps import FLOW, SETTINGS, SHAPE, VP, Ctx64, batch
from torch import Tensor, nn

from stepdistill.config.run import RunConfig
from stepdistill.core.method import Setting
from stepdistill.core.path import VEPath
from stepdistill.losses.adversarial import discriminator_loss, generator_loss
from stepdistill.methods import METHODS
from stepdistill.methods.consistency import Consistency
from stepdistill.methods.consistency_config import ConsistencyConfig
from stepdistill.methods.scott import SCott, SCottConfig
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
PATHS = {**SETTINGS, "ve": (VEPath(), 1.0)}
PLAIN = {"guidance_range": (1.0, 1.0), "target": "self"}
ALONE = {**PLAIN, "gan": {"weight_g": 0.0}}


def make(setting: str = "vp", **options) -> SCott:
    path, shift = PATHS[setting]
    return SCott(SCottConfig(**{**ALONE, **options}), Setting(path, "v", shift))


class MeanHead(nn.Module):
    """(B, C, *S) feature -> (B, 1) logit, its mean."""

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features["mid"].flatten(1).mean(1, keepdim=True)


def nets_of(path, std: float = 0.5, student_std: float = 0.3) -> AnalyticNets:
    student = GaussianTeacher(path, student_std)
    teacher = GaussianTeacher(path, std)
    roles = {"teacher": teacher, "student": student, "target": student}
    return AnalyticNets(roles, {"disc": MeanHead()})


def test_each_step_draws_noise_of_its_own_on_times_of_the_table() -> None:
    method = make("vp", num_grid=40, eta=0.5, solver_steps=3)
    seen: list[Tensor] = []

    class Spy(GaussianTeacher):
        def posterior_mean(self, x_t, t, cond):
            seen.append(VP.model_time(t))
            return super().posterior_mean(x_t, t, cond)

    ctx, data = Ctx64(), batch(4)
    t, s = method.grid.pair(torch.tensor([0, 1, 20, 39]))
    x_t = VP.add_noise(data.x0, ctx.randn((4, *SHAPE)), t)
    before = ctx.draws
    method.solver(ctx)(Spy(VP, 0.5), x_t, t, s, data.cond, None, 1.0)
    assert ctx.draws - before == 3
    assert [n.round().tolist() for n in seen] == [n.tolist() for n in seen]
    gaps = -torch.stack([*seen, VP.model_time(s)]).diff(dim=0)
    assert (float(gaps.min()), float(gaps.max())) == (8.0, 9.0)


# ------------------------------------------------------------------------- consistency's own inside
@pytest.mark.parametrize("setting", PATHS)
@pytest.mark.parametrize("guided", [False, True])
def test_without_noise_steps_and_head_it_is_consistency_bit_for_bit(setting, guided) -> None:
    path, shift = PATHS[setting]
    shared = {"guidance_range": (2.0, 4.0) if guided else (1.0, 1.0), "num_grid": 40}
    one = make(setting, **shared, eta=0.0, solver_steps=1)
    other = Consistency(ConsistencyConfig(**{**PLAIN, **shared}), Setting(path, "v", shift))
    data, losses = batch(16, std=0.5), []
    for method in (one, other):
        (phase,) = method.phases(0)
        losses.append(phase.loss(nets_of(path), data, Ctx64(seed=2)).total)
    assert torch.equal(*losses)
    assert one.sampler(4) == other.sampler(4)
    assert one.roles() == other.roles()
    noisy = make(setting, **shared, eta=0.5, solver_steps=1)
    assert noisy.loss(nets_of(path), data, Ctx64(seed=2)).total != losses[0]


def test_samples_in_two_steps_with_fresh_noise() -> None:
    spec = SCott(SCottConfig(), Setting(VP, "v")).sampler()
    assert (spec.num_steps, spec.kind) == (2, "renoise")
    assert VP.model_time(torch.tensor(spec.times)).tolist() == [999.0, 499.0]


# ---------------------------------------------------------------------------------------- the head
def test_the_head_s_loss_is_added_and_its_gradient_reaches_the_student() -> None:
    """With a head that reads the mean of noised x0: minus weight_g times its mean."""
    gan = make("flow", gan={"weight_g": 0.4})
    alone = make("flow")
    theta = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    class Shifted(GaussianTeacher):
        def posterior_mean(self, x_t, t, cond):
            return super().posterior_mean(x_t, t, cond) + theta

    nets = nets_of(FLOW)
    nets._denoisers.update(student=Shifted(FLOW, 0.3))
    data, ctx = batch(64, std=0.5), Ctx64(seed=4)
    losses = gan.loss(nets, data, ctx)
    base = alone.loss(nets, data, Ctx64(seed=4)).total
    torch.testing.assert_close(losses.total, base + 0.4 * losses.logs["gan_g"], rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(losses.total - base, theta)
    # x_t = (1 - t) x0 + t eps on a flow path: the mean logit moves by the mean of 1 - t.
    again = Ctx64(seed=4)
    _, x0 = gan.compare(nets, data, again)
    t = gan.draw_times(again, 64)
    assert float(grad) == pytest.approx(-0.4 * float((1 - t).mean()), rel=1e-6)
    sample = ctx.carry["sample"]
    assert torch.equal(sample.x0, x0)
    assert not sample.x0.requires_grad


def test_the_head_learns_images_from_the_x0_that_the_student_made() -> None:
    method = make("flow", gan={"weight_g": 0.4, "weight_d": 2.0})
    student, disc = method.phases(0)
    assert [p.trains for p in (student, disc)] == [("student",), ("disc",)]
    assert [(p.reads_x0, p.reads_real) for p in (student, disc)] == [(True, False), (False, True)]
    nets, data, ctx = nets_of(FLOW), batch(16, std=0.5), Ctx64(seed=4)
    student.loss(nets, data, ctx)
    made = ctx.carry["sample"].x0
    found = disc.loss(nets, data, ctx)
    again = Ctx64(seed=4)
    student.loss(nets, data, again)
    sides = []
    for x0 in (made, data.x0):  # the order of the draws
        t = method.draw_times(again, 16)
        noised = FLOW.add_noise(x0, again.randn((16, *SHAPE)), t)
        sides.append(noised.flatten(1).mean(1, keepdim=True))
    expected = 2.0 * discriminator_loss(sides[1], sides[0], "hinge")
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=0)
    assert float(generator_loss(sides[0], "hinge")) == pytest.approx(-float(sides[0].mean()))


def test_the_head_judges_at_every_time_of_the_grid_alike() -> None:
    method = make("ve", num_grid=4)
    t = method.draw_times(Ctx64(), 8192)
    values, counts = t.unique(return_counts=True)
    torch.testing.assert_close(values, method.grid.starts)
    assert counts.tolist() == pytest.approx([2048] * 4, rel=0.08)


# -------------------------------------------------------------------------------------- its options
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": -0.01}, "eta"),
        ({"eta": 1.01}, "eta"),
        ({"solver_steps": 0}, "solver_steps"),
        ({"solver": "heun"}, "solver"),
        ({"solver": "data"}, "solver"),
        ({"gan": {"source": "fake"}}, "source"),
        ({"gan": {"weight_d": 0.0}}, "weight_d"),
        ({"num_steps": 41}, "num_steps: expected at most num_grid = 40"),
        ({"num_grid": 500, "solver_steps": 3}, "solver_steps: expected at most 2, the table"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        make("vp", **options)


def test_the_last_values_inside_the_limits_are_taken() -> None:
    make("vp", eta=1.0, num_grid=500, solver_steps=2, num_steps=500)
    make("flow", num_grid=500, solver_steps=3)
    make("vp", num_grid=1000, solver_steps=3, shrink={})


def test_roles_and_needs_follow_the_head() -> None:
    method = SCott(SCottConfig(), Setting(VP, "v"))
    assert set(method.roles()) == {"teacher", "student", "target", "disc"}
    assert method.needs == {"cond", "x0", "real"}
    assert set(make().roles()) == {"teacher", "student"}
    assert make().needs == {"cond", "x0"}


def test_settings_file_is_valid() -> None:
    text = yaml.safe_load((CONFIGS / "scott.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="x", **text)
    config = METHODS[run.method].Config(**run.method_config)
    assert (config.num_steps, config.solver_steps, config.gan.weight_g) == (2, 3, 0.4)
