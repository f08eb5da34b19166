"""Guidance distillation and progressive halving against Gaussian teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from support.jumps import FLOW, SETTINGS, SHAPE, VP, Ctx64, batch
from torch import Tensor

from stepdistill.config.run import RunConfig
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Setting
from stepdistill.core.path import NoisePath, expand
from stepdistill.core.solvers import sample_x0
from stepdistill.core.times import shift_times
from stepdistill.core.types import Cond
from stepdistill.losses.progressive import progressive_target
from stepdistill.methods.halving import trailing_grid
from stepdistill.methods.lora_guidance import LoRAGuidance, LoRAGuidanceConfig
from stepdistill.methods.lora_guidance_config import DIGITS
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
G = 3.0  # the null mean is 0, so guidance multiplies the mean


def make(setting: str = "vp", kind: str = "x0", **options) -> LoRAGuidance:
    path, shift = SETTINGS[setting]
    return LoRAGuidance(
        LoRAGuidanceConfig(**{"guidance": G, **options}), Setting(path, kind, shift)
    )


class Student(AnalyticDenoiser):
    """Gaussian denoiser whose mean is scaled: by w + 1 where told, else by `scale`."""

    def __init__(self, path, std: float, scale: float | Tensor = 1.0, kind: str = "x0") -> None:
        super().__init__(path, kind)
        self.exact, self.scale = GaussianTeacher(path, std), scale
        self.seen: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def raw(self, x_t, t, cond, w, features):
        self.seen.append((x_t, t, w))
        self.told = self.scale if w is None else expand(w.double() + 1, x_t)
        return super().raw(x_t, t, cond, w, features)

    def posterior_mean(self, x_t, t, cond):
        return self.exact.posterior_mean(x_t, t, Cond({"mean": self.told * cond["mean"]}))


def loss_of(method, student: Denoiser, std: float = 0.5, kind: str = "x0", target=None, **ctx):
    teacher = GaussianTeacher(method.setting.path, std, kind)
    nets = AnalyticNets({"teacher": teacher, "student": student, "target": target or student})
    (phase,) = method.phases(0)
    return phase.loss(nets, batch(std=std), Ctx64(**{"seed": 1, "max_steps": 1000, **ctx})).total


# ------------------------------------------------------------------------------- guidance stage
# A flow path ends at alpha = 0, where eps says nothing of x0: no flow model predicts it.
KINDS = [
    (setting, kind)
    for setting in SETTINGS
    for kind in ("x0", "eps", "v", "flow")
    if setting == "vp" or kind != "eps"
]


@pytest.mark.parametrize("states", ["data", "trajectory"])
@pytest.mark.parametrize(("setting", "kind"), KINDS)
def test_loss_and_gradient_are_zero_at_the_guided_gaussian(setting, states, kind) -> None:
    method = make(setting, kind, states=states)
    scale = torch.tensor(G, dtype=torch.float64, requires_grad=True)
    loss = loss_of(method, Student(method.setting.path, 0.5, scale, kind), kind=kind)
    loss.backward()
    assert loss < 1e-18
    assert scale.grad.abs() < 1e-7


@pytest.mark.parametrize("loss_on", ["raw", "x0", "eps", "v", "flow"])
@pytest.mark.parametrize("setting", ["vp", "flow"])
def test_loss_of_the_teacher_itself_is_its_guidance(setting, loss_on) -> None:
    """(g - 1)^2 |out_c - out_u|^2 in the view asked for, at the very states it was asked at."""
    method = make(setting, "eps", loss_on=loss_on)
    student, teacher = Student(method.setting.path, 0.5, 1.0, "eps"), None
    found = loss_of(method, student, kind="eps")
    teacher, data = GaussianTeacher(method.setting.path, 0.5, "eps"), batch(std=0.5)
    ((x_t, t, _),) = student.seen
    views = [
        p.raw if loss_on == "raw" else p.as_type(loss_on)
        for p in (teacher(x_t, t, data.cond), teacher(x_t, t, data.null))
    ]
    expected = (G - 1) ** 2 * ((views[0] - views[1]) ** 2).mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("setting", ["vp", "flow"])
def test_gradient_off_the_solution_points_back_with_its_closed_form(setting) -> None:
    """x0 = ... + a mu_scale m: d loss / d scale = 2 (scale - g) mean (k m)^2, k = sigma^2 / V."""
    method = make(setting)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    student = Student(method.setting.path, 0.5, scale)
    loss_of(method, student).backward()
    ((_, t, _),) = student.seen
    alpha, sigma = method.setting.path.coeffs(t)
    gain = sigma**2 / (alpha**2 * 0.25 + sigma**2)
    expected = 2 * (1.0 - G) * ((0.7 * gain) ** 2).mean()
    torch.testing.assert_close(scale.grad, expected, rtol=1e-9, atol=0)


def test_told_guidance_reaches_teacher_and_student_alike() -> None:
    method = make(embed_guidance=True, guidance_range=(1.0, 5.0))
    student = Student(VP, 0.5)
    assert loss_of(method, student) < 1e-10  # w travels in float32
    w = student.seen[0][2]
    assert w.shape == (64,)
    assert 0 <= float(w.min()) < 0.5
    assert 3.5 < float(w.max()) <= 4


def test_no_guidance_makes_the_conditional_teacher_the_target() -> None:
    """w = 0: the teacher's conditional answer is the solution."""
    method = make(embed_guidance=True, guidance_range=(1.0, 1.0 + 1e-12), guidance=1.0)
    assert loss_of(method, GaussianTeacher(VP, 0.5)) < 1e-18
    assert loss_of(make(), GaussianTeacher(VP, 0.5)) > 1e-3


def guided_state(path: NoisePath, seed: int, t: Tensor) -> Tensor:
    """Where the guided mean's flow map takes that seed's noise to at t: of a point mass."""
    noise = Ctx64(seed=seed, max_steps=1000).randn((64, *SHAPE))
    guided = Cond({"mean": G * batch().cond["mean"]})
    return GaussianTeacher(path, 0.0).flow_map(path.prior(noise), torch.ones_like(t), t, guided)


@pytest.mark.parametrize("setting", SETTINGS)
def test_trajectory_states_lie_on_the_guided_trajectory(setting) -> None:
    """A point mass makes every step exact: the state is the guided mean's flow map of the noise."""
    method = make(setting, states="trajectory")
    path = method.setting.path
    for seed in range(4):
        student = Student(path, 0.0, G)
        loss_of(method, student, std=0.0, seed=seed)
        ((x_t, t, _),) = student.seen
        torch.testing.assert_close(x_t, guided_state(path, seed, t), rtol=0, atol=1e-9)
        assert bool((t == t[0]).all()), "one time for the batch"


def test_trajectory_times_cover_the_axis_and_need_prompts_alone() -> None:
    method = make("flow", states="trajectory", trajectory_steps=4)
    assert method.needs == {"cond"}
    assert make().needs == {"cond", "x0"}
    times = []
    for seed in range(64):
        student = Student(FLOW, 0.5, G)
        loss_of(method, student, seed=seed)
        times.append(float(student.seen[0][1][0]))
    counts = torch.histc(torch.tensor(times), bins=4, min=0, max=1)
    assert float(counts.min()) >= 6, times


def test_data_times_are_the_table_s_entries_uniformly() -> None:
    student = Student(VP, 0.5, G)
    for seed in range(40):
        loss_of(make(), student, seed=seed)
    index = torch.cat([t for _, t, _ in student.seen]) * 1000
    assert torch.equal(index, index.round())
    assert abs(float(index.mean()) - 500.5) < 25
    assert 1 <= float(index.min()) < 4
    assert float(index.max()) == 1000


def test_data_times_of_a_flow_path_are_the_shifted_draws() -> None:
    student = Student(FLOW, 0.5, G)
    method = make("flow_shifted", states="data")
    loss_of(method, student, seed=4)
    drawn = 1.0 - Ctx64(seed=4, max_steps=1000).rand(64)
    ((_, t, _),) = student.seen
    assert torch.equal(t, shift_times(drawn, method.setting.shift))
    assert 0 < float(t.min()) < 0.1 < 0.9 < float(t.max()) <= 1


class Counted(GaussianTeacher):
    """A teacher that notes the time of every call."""

    def __init__(self, path) -> None:
        super().__init__(path, 0.5)
        self.times: list[float] = []

    def raw(self, x_t, t, *rest):
        self.times.append(float(t[0]))
        return super().raw(x_t, t, *rest)


@pytest.mark.parametrize("steps", [1, 4, 10])
@pytest.mark.parametrize("seed", range(3))
def test_a_trajectory_is_as_many_equal_steps_as_keep_each_below_the_limit(steps, seed) -> None:
    teacher = Counted(FLOW)
    nets = AnalyticNets({"teacher": teacher, "student": Student(FLOW, 0.5, G)})
    method = make("flow", states="trajectory", trajectory_steps=steps)
    (phase,) = method.phases(0)
    phase.loss(nets, batch(std=0.5), Ctx64(seed=seed, max_steps=1000))
    end = 1.0 - Ctx64(seed=seed, max_steps=1000).shared_rand()
    *visited, last = teacher.times  # the last call is the target's
    count = next(n for n in range(1, steps + 1) if (1.0 - end) / n <= 1.0 / steps)
    grid = [1.0 - (1.0 - end) * i / count for i in range(count + 1)]
    assert visited == pytest.approx(grid[:-1], abs=1e-12)
    assert last == pytest.approx(end, abs=1e-12)


# ------------------------------------------------------------------------------ halving rounds
class Halved(AnalyticDenoiser):
    """The exact student of a round: its x0 is the target of two steps of its teacher."""

    def __init__(self, method: LoRAGuidance, steps: int, teacher: Denoiser) -> None:
        super().__init__(method.setting.path, "x0")
        grid = torch.tensor((*trailing_grid(method.setting, 2 * steps), 0.0), dtype=torch.float64)
        self.grid, self.teacher = grid, teacher

    def posterior_mean(self, x_t, t, cond):
        index = (self.grid[None, :] - t[:, None]).abs().argmin(1)
        middle, s = self.grid[index + 1], self.grid[index + 2]
        x_s = self.teacher(self.teacher(x_t, t, cond).step(middle), middle, cond).step(s)
        return progressive_target(self.path, x_t, x_s, t, s)


def chain(method: LoRAGuidance, guided: Denoiser) -> list[Denoiser]:
    """The guided teacher and the exact student of every round."""
    found = [guided]
    for steps in method.config.num_steps:
        found.append(Halved(method, steps, found[-1]))
    return found


@pytest.mark.parametrize("weight", ["snr_trunc", "1+snr", "flow"])
@pytest.mark.parametrize("states", ["data", "trajectory"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_rounds_have_zero_loss_at_the_exact_students(setting, states, weight) -> None:
    options = {"num_steps": (4, 2, 1), "guidance_stage": False, "states": states}
    method = make(setting, halving_weight=weight, **options)
    nets = chain(method, Student(method.setting.path, 0.5, G))
    for stage, step in enumerate((0, 400, 900)):
        assert method.config.stage_of(step, 1000) == stage
        good = loss_of(method, nets[stage + 1], target=nets[stage], step=step)
        assert good < 1e-12
        assert loss_of(method, nets[stage], target=nets[stage], step=step) > 1e-6


@pytest.mark.parametrize("setting", SETTINGS)
def test_halving_a_linear_denoiser_is_exact_in_the_limit(setting) -> None:
    """One step of the last student is the first teacher's long trajectory, which nears the ODE."""
    errors = []
    for first in (8, 32):
        rounds = tuple(first // 2**i for i in range(first.bit_length()))
        method = make(setting, num_steps=rounds, guidance_stage=False)
        path, data = method.setting.path, batch()
        guided = Student(path, 0.5, G)
        noise = Ctx64(seed=3).randn((64, *SHAPE))
        one = sample_x0(chain(method, guided)[-1], method.sampler(), noise, data.cond)
        grid = trailing_grid(method.setting, 2 * first)
        long = sample_x0(guided, make(setting).sampler(2 * first), noise, data.cond)
        assert method.sampler().times == (1.0,)
        assert make(setting).sampler(2 * first).times == grid
        torch.testing.assert_close(one, long, rtol=0, atol=1e-9)
        ones = torch.ones(64, dtype=torch.float64)
        exact = GaussianTeacher(path, 0.5).flow_map(
            path.prior(noise), ones, 0 * ones, Cond({"mean": G * data.cond["mean"]})
        )
        errors.append(float((one - exact).abs().max()))
    assert errors[1] < 0.5 * errors[0], errors


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_round_s_trajectory_states_are_its_teacher_s_at_the_student_s_times(setting) -> None:
    """A point mass makes every step exact, as above; the student is asked at every other time."""
    method = make(setting, num_steps=(4,), guidance_stage=False, states="trajectory")
    path, times = method.setting.path, set()
    for seed in range(24):
        student = Student(path, 0.0, G)
        loss_of(method, student, std=0.0, seed=seed)
        ((x_u, u, _),) = student.seen
        torch.testing.assert_close(x_u, guided_state(path, seed, u), rtol=0, atol=1e-9)
        times.add(float(u[0]))
    assert times == set(trailing_grid(method.setting, 8)[::2])


def test_later_rounds_pass_w_to_teacher_and_student_and_call_no_null() -> None:
    method = make(num_steps=(4,), embed_guidance=True, guidance_range=(1.0, 5.0))
    student, target = Student(VP, 0.5), Student(VP, 0.5)
    loss_of(method, student, target=target, step=600)
    assert torch.equal(student.seen[0][2], target.seen[0][2])
    assert len(target.seen) == 2
    assert all(len(x) == 64 for x, _, _ in target.seen), "no 2B batch: guidance is folded in"


def test_a_round_begins_at_the_prior_where_sampling_does() -> None:
    student = Student(VP, 0.5, G)
    loss_of(make(num_steps=(2,), guidance_stage=False), student)
    x_u, u, _ = student.seen[0]
    ctx = Ctx64(seed=1, max_steps=1000)
    ctx.randint(0, 2, 64)
    noise = ctx.randn((64, *SHAPE))
    first = u == 1.0
    assert 0 < int(first.sum()) < 64
    assert torch.equal(x_u[first], noise[first])
    assert set(u.tolist()) == {1.0, 0.5}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_digits_rounds_halve_from_eight_to_the_student_s_steps(steps) -> None:
    options = DIGITS.settings["method_config"] | DIGITS.by_steps[steps]["method_config"]
    method = LoRAGuidance(LoRAGuidanceConfig(**options), Setting(VP, "v"))
    assert method.config.num_steps[0] == 8
    assert method.sampler().num_steps == steps


# ------------------------------------------------------------------------------- the contract
def test_stages_resets_and_rates() -> None:
    method = make(num_steps=(8, 4), stage_rates=(1.0, 0.5, 0.25), anneal=True)
    assert [method.config.stage_of(step, 6) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [method.resets(step, 6) for step in range(6)] == [
        (),
        (),
        ("student",),
        (),
        ("student",),
        (),
    ]
    rates = [method.learning_rate_scale(step, 6, "student") for step in range(6)]
    assert rates == [1.0, 0.5, 0.5, 0.25, 0.25, 0.125]
    assert make().learning_rate_scale(5, 6, "student") == 1.0


def test_roles_hold_a_copy_only_where_a_round_needs_one() -> None:
    assert set(make().roles()) == {"teacher", "student"}
    assert set(make(num_steps=(4,), guidance_stage=False).roles()) == {"teacher", "student"}
    roles = make(num_steps=(4,)).roles()
    assert roles["target"].ema_of == "student"
    told = make(num_steps=(4,), embed_guidance=True, guidance_range=(2.0, 4.0)).roles()
    assert told["target"].extra_inputs == told["student"].extra_inputs == ("w",)


def test_samplers() -> None:
    spec = make().sampler()
    assert (spec.num_steps, spec.guidance, spec.keeps_scheduler, spec.w) == (50, 1.0, True, None)
    told = make(embed_guidance=True, guidance_range=(2.0, 4.0)).sampler()
    assert told.w == G - 1
    method = make(num_steps=(8, 4))
    halved = method.sampler()
    assert VP.model_time(torch.tensor(halved.times).double()).tolist() == [999, 749, 499, 249]
    assert halved.trained_times == halved.times
    assert not halved.keeps_scheduler
    with pytest.raises(ValueError, match="expected 4, the last round's"):
        method.sampler(2)


def test_a_run_cut_short_is_sampled_as_its_stage_is() -> None:
    method = make(num_steps=(8, 4))
    found = [method.sampler_at(step, 6) for step in range(7)]
    assert [spec.num_steps for spec in found] == [4, 50, 50, 8, 8, 4, 4]
    assert [spec.keeps_scheduler for spec in found] == [False, True, True, *[False] * 4]
    assert found[3].times == found[3].trained_times
    assert found[6] == method.sampler()
    with pytest.raises(ValueError, match="expected 8, the last round's, got 4"):
        method.sampler_at(3, 6, 4)


@pytest.mark.parametrize("steps", [(4, 2), (4, 2, 1), (8, 4, 2)])
def test_eps_students_stop_at_four_steps(steps) -> None:
    make(kind="eps", num_steps=(8, 4))
    make(kind="eps", num_steps=(4,))
    make(kind="v", num_steps=steps)
    with pytest.raises(ValueError, match=f"got {steps[-1]}: .* Stop at 4"):
        make(kind="eps", num_steps=steps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_guidance": True}, "exactly with embed_guidance"),
        ({"guidance_range": (1.0, 4.0)}, "exactly with embed_guidance"),
        ({"embed_guidance": True, "guidance_range": (4.0, 2.0)}, "low < high"),
        ({"embed_guidance": True, "guidance_range": (4.0, 5.0)}, "inside guidance_range"),
        ({"num_steps": (8, 2)}, "counts that halve"),
        ({"num_steps": (3, 0)}, "counts that halve"),
        ({"guidance_stage": False}, "expected halving rounds"),
        ({"num_steps": (8, 4), "stage_starts": (0.5,)}, "2 rising numbers"),
        ({"num_steps": (4,), "stage_rates": (1.0,)}, "2 factors > 0"),
    ],
)
def test_impossible_options_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAGuidanceConfig(**{"guidance": G, **options})


def test_without_guidance_there_is_something_to_learn_for_another_student_alone() -> None:
    """Then it is teacher score matching: zero at the teacher, not elsewhere."""
    method = make(guidance=1.0)
    method.check_student(begins_as_teacher=False)
    make().check_student(begins_as_teacher=True)
    with pytest.raises(ValueError, match="is its own student"):
        method.check_student(begins_as_teacher=True)
    assert loss_of(method, GaussianTeacher(VP, 0.5)) < 1e-18
    assert loss_of(method, GaussianTeacher(VP, 0.9)) > 1e-3


@pytest.mark.parametrize("name", ["lora_guidance", "progressive"])
def test_shipped_configs_are_valid(name) -> None:
    content = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="somewhere", **content)
    method = LoRAGuidance(LoRAGuidanceConfig(**run.method_config), Setting(VP, "eps"))
    assert method.config.guidance == 7.5
    assert method.sampler().num_steps == (50 if name == "lora_guidance" else 4)
