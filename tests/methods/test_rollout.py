"""Student grids and rollouts: inputs of each step, agreement with the sampler, bad settings."""

from __future__ import annotations

import pytest
import torch
from support.score import (
    BSZ,
    PATHS,
    VP,
    batch_of,
    fake_nets,
    make,
)

from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, VEPath
from stepdistill.core.solvers import sample_x0
from stepdistill.methods import METHODS
from stepdistill.methods.dmd2 import DMD2Config
from stepdistill.methods.rollout import owned_times

FOUR = (1.0, 0.75, 0.5, 0.25)


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


# ------------------------------------------------------------------------------------ rollout
def ctx_at_step(k: int, steps: int = 4, **more: object) -> Ctx:
    """A Ctx whose first shared draw is step k."""
    for step in range(1000):
        if Ctx(step=step, **more).shared_randint(0, steps) == k:  # type: ignore[arg-type]
            return Ctx(step=step, **more)  # type: ignore[arg-type]
    raise AssertionError("no such step")


@pytest.mark.parametrize("rollout", ["simulate", "data"])
def test_the_first_step_starts_from_pure_noise(path: NoisePath, rollout: str) -> None:
    method = make(path, rollout=rollout, num_steps=4)
    student, _, nets = fake_nets(path)
    batch = batch_of(x0=torch.full((BSZ, 2), 50.0))
    ctx = ctx_at_step(0)
    method.rollout(nets, batch, ctx)
    replay = Ctx(step=ctx.step).randn((BSZ, 2))
    assert len(student.calls) == 1
    assert torch.equal(student.calls[0][0], path.prior(replay))
    assert torch.equal(student.calls[0][1], torch.ones(BSZ, dtype=torch.float64))


def test_simulation_runs_the_earlier_steps_without_gradients(path: NoisePath) -> None:
    method = make(path, num_steps=4)
    student, _, nets = fake_nets(path)
    method.rollout(nets, batch_of(), ctx_at_step(2))
    assert [call[1][0].item() for call in student.calls] == pytest.approx([1.0, 0.75, 0.5])
    assert [call[3] for call in student.calls] == [False, False, True]


@pytest.mark.parametrize("sampler", ["renoise", "ode"])
def test_simulation_is_the_sampler_of_the_same_grid(path: NoisePath, sampler: str) -> None:
    """The last step of a simulated rollout is what the exported student will output."""
    method = make(path, num_steps=4, sampler=sampler)
    student, _, nets = fake_nets(path)
    ctx = ctx_at_step(3)
    got = method.rollout(nets, batch_of(), ctx)
    replay = Ctx(step=ctx.step)
    noise = replay.randn((BSZ, 2))
    spec = method.sampler()
    assert spec.kind == sampler
    expected = sample_x0(
        student.inner, spec, noise, batch_of().cond, fresh_noise=lambda i: replay.randn((BSZ, 2))
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_deterministic_rollout_draws_no_noise_on_the_way() -> None:
    method = make(FlowPath(), num_steps=4, sampler="ode")
    student, _, nets = fake_nets(FlowPath())
    ctx = ctx_at_step(1)
    method.rollout(nets, batch_of(), ctx)
    (x1, _, _, _), (x2, _, _, _) = student.calls
    # Affine with A = I, b = 0 answers x0 = x_t, so flow = 0 and the Euler step stays put.
    torch.testing.assert_close(x1, x2)


def test_simulated_samples_do_not_depend_on_the_datasets_latents() -> None:
    method = make(VP, num_steps=4)
    outs = []
    for value in (0.0, 7.0):
        _, _, nets = fake_nets(VP)
        x0 = torch.full((BSZ, 2), value)
        outs.append(method.rollout(nets, batch_of(x0=x0), ctx_at_step(3)))
    assert torch.equal(*outs)


def test_data_rollout_feeds_noised_real_latents() -> None:
    method = make(FlowPath(), num_steps=4, rollout="data")
    student, _, nets = fake_nets(FlowPath())
    method.rollout(nets, batch_of(512, x0=torch.full((512, 2), 8.0)), ctx_at_step(3))
    assert len(student.calls) == 1
    x_t, t, _, _ = student.calls[0]
    assert t[0].item() == 0.25
    assert x_t.mean().item() == pytest.approx(0.75 * 8.0, abs=0.03)
    assert x_t.std().item() == pytest.approx(0.25, rel=0.1)


def test_every_rank_takes_the_same_step_on_other_noise() -> None:
    method, seen = make(FlowPath(), num_steps=4), []
    for step in range(12):
        inputs = []
        for rank in (0, 1):
            student, _, nets = fake_nets(FlowPath())
            method.rollout(nets, batch_of(8), Ctx(step=step, rank=rank, world_size=2))
            inputs.append((len(student.calls), student.calls[0][0]))
        assert inputs[0][0] == inputs[1][0]
        assert not torch.equal(inputs[0][1], inputs[1][1])
        seen.append(inputs[0][0])
    assert set(seen) == {1, 2, 3, 4}


def test_two_ranks_draw_what_one_process_with_both_batches_draws() -> None:
    method = make(FlowPath(), num_steps=2)
    _, _, nets = fake_nets(FlowPath())
    whole = method.rollout(nets, batch_of(8), Ctx(step=3))
    halves = [
        method.rollout(nets, batch_of(4), Ctx(step=3, rank=rank, world_size=2)) for rank in (0, 1)
    ]
    assert torch.equal(whole, torch.cat(halves))


# --------------------------------------------------------------------------- grids and sampler
def test_one_step_students_may_be_conditioned_on_an_earlier_time() -> None:
    """DMD2's one-step SDXL: pure noise in, conditioning index 399."""
    method = make(VP, "eps", student_times=(0.4,))
    student, _, nets = fake_nets(VP)
    method.rollout(nets, batch_of(), Ctx())
    x, t, _, _ = student.calls[0]
    assert VP.model_time(t)[0].item() == 399.0
    assert torch.equal(x, Ctx().randn((BSZ, 2)))
    assert method.sampler(1).times == (0.4,)


def test_four_steps_on_a_table_are_the_releases_indices() -> None:
    spec = make(VP, num_steps=4).sampler()
    indices = VP.model_time(torch.tensor(spec.times, dtype=torch.float64))
    assert indices.tolist() == [999.0, 749.0, 499.0, 249.0]
    assert (spec.kind, spec.guidance, spec.trained_times) == ("renoise", 1.0, FOUR)


def test_flow_grid_follows_the_teachers_shift_or_the_configs() -> None:
    assert make(FlowPath(), "flow", 5.0, num_steps=4).sampler().times == pytest.approx(
        (1.0, 0.9375, 5 / 6, 0.625)
    )
    assert make(FlowPath(), "flow", 5.0, num_steps=4, shift=1.0).sampler().times == FOUR


def test_fewer_steps_must_lie_on_the_trained_grid() -> None:
    method = make(VP, num_steps=4)
    assert method.sampler(2).times == (1.0, 0.5)
    with pytest.raises(ValueError, match="expected times from the trained grid"):
        method.sampler(3)


def test_grids_that_do_not_divide_the_table_are_moved_onto_it() -> None:
    assert make(VP, num_steps=3).sampler().times == pytest.approx((1.0, 0.667, 0.333))
    assert make(VP, num_steps=6).sampler(3).num_steps == 3


# ------------------------------------------------------------------------------ bad settings
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rollout": "pure_noise", "num_steps": 4}, "got pure_noise"),
        ({"student_times": (0.5, 1.0)}, "expected descending times"),
        ({"student_times": ()}, "expected descending times"),
        ({"student_times": (1.2, 0.5)}, r"in \(0, 1\]"),
        ({"student_times": (1.0, 0.3333)}, "The nearest are"),
        ({"dm_t_range": (0.9, 0.1)}, "expected 0 <= low < high <= 1"),
        ({"critic_steps": 0}, "greater than or equal to 1"),
        ({"gan": {"weight": 1.0}}, "Extra inputs"),
    ],
)
def test_bad_settings_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(VP, **config)


def test_student_times_win_over_num_steps_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="num_steps 2 has no effect"):
        method = make(VP, num_steps=2, student_times=FOUR)
    assert method.sampler().times == FOUR


@pytest.mark.parametrize("method", ["reflow", "rfpp", "dmd2", "lora_guidance"])
def test_a_grid_finer_than_an_edm_teacher_s_is_refused_with_the_largest_count(method):
    cls = METHODS[method]
    options = {"guidance": 3.0} if method == "lora_guidance" else {}
    made = cls(cls.Config(**options), Setting(VEPath(), "x0"))
    if method != "dmd2":  # there the trained grid is met first
        assert made.sampler(9).times[-1] == VEPath().lowest
    with pytest.raises(ValueError, match="num_steps: expected at most 9, got 10"):
        made.sampler(10)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"num_steps": 1, "sampler": "ode"}, True),
        ({"num_steps": 4, "sampler": "ode"}, False),
        ({"num_steps": 4, "sampler": "ode", "trained_step": "last"}, True),
        ({"num_steps": 4, "sampler": "renoise"}, True),
    ],
)
def test_a_trained_step_shows_an_image_where_sampling_makes_it(options, shown) -> None:
    assert make(VP, **options).rollout.shown is shown


def test_an_expert_s_sampler_knows_the_grid_of_both() -> None:
    """Of its own steps the trained grid, of other counts the uniform one; alone it knows none."""
    config = DMD2Config(num_steps=4, guidance=1.0)
    alone, high = Setting(FlowPath(), "flow"), Setting(FlowPath(), "flow", owned=(0.5, 1.0))
    assert config.spec(alone).grid == ()
    assert config.spec(alone, 2).grid == ()
    spec = config.spec(high)
    assert (spec.times, spec.grid) == ((1.0, 0.75, 0.5), FOUR)
    typed = DMD2Config(student_times=(1.0, 0.9, 0.6, 0.3), guidance=1.0).spec(high)
    assert (typed.times, typed.grid) == ((1.0, 0.9, 0.6), (1.0, 0.9, 0.6, 0.3))


def test_a_time_between_two_experts_is_the_noisier_one_s() -> None:
    """Its lower end included, its upper one only if it is 1; rounding on either side of it."""
    grid = (1.0, 0.75, 0.5, 0.25)
    assert owned_times(grid, (0.5, 1.0)) == (1.0, 0.75, 0.5)
    assert owned_times(grid, (0.0, 0.5)) == (0.25,)
    for near in (0.5 + 5e-7, 0.5 - 5e-7):
        assert owned_times((1.0, near, 0.25), (0.5, 1.0)) == (1.0, near)
        assert owned_times((1.0, near, 0.25), (0.0, 0.5)) == (0.25,)
    with pytest.raises(ValueError, match=r"from 0 to 0.1, the expert's times"):
        owned_times(grid, (0.0, 0.1))
