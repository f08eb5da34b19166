"""preference on analytic policies: exact log-ratios of one step, its own times, what is refused."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, LCMScheduler
from support.runs import teacher_dir
from support.score import PATHS
from torch import Tensor, nn
from torch.distributions import Normal

from stepdistill.core.abilities import Abilities
from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, VPPath
from stepdistill.core.types import Batch, Cond
from stepdistill.families.registry import load_family, teacher_facts
from stepdistill.families.schedule import own_sampler, visited_times
from stepdistill.methods.preference import Preference, PreferenceConfig
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets

BSZ, SHAPE = 4, (3, 2)


class Constant(AnalyticDenoiser, nn.Module):
    """Answers one x0, whatever it sees; remembers what that was."""

    def __init__(self, path: NoisePath, value: float) -> None:
        nn.Module.__init__(self)
        AnalyticDenoiser.__init__(self, path)
        self.value = nn.Parameter(torch.full(SHAPE, value))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen.append((x_t, t))
        return self.value.expand(len(x_t), *SHAPE).to(x_t)


def batch_of(swapped: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(3)
    one, other = (torch.randn(BSZ, *SHAPE, generator=generator) for _ in range(2))
    chosen, rejected = (other, one) if swapped else (one, other)
    cond = Cond({"mean": torch.zeros(BSZ, *SHAPE)})
    return Batch(cond, cond, SHAPE, x0=chosen, extra={"rejected": rejected})


def made(path: NoisePath, **options: Any) -> Preference:
    return Preference(PreferenceConfig(**options), Setting(path, "x0"))


def loss_of(method: Preference, batch: Batch, student: float = 0.3, teacher: float = -0.2) -> Any:
    path = method.setting.path
    nets = {"student": Constant(path, student), "teacher": Constant(path, teacher)}
    return method.loss(AnalyticNets(nets), batch, Ctx()), nets


@pytest.mark.parametrize("name", list(PATHS))
def test_a_one_step_log_ratio_is_exact(name) -> None:
    """Of a one-step generator x0hat(noise) + sigma z, whose noise tells nothing of the image."""
    path, batch = PATHS[name], batch_of()
    losses, nets = loss_of(made(path, num_steps=1, rejected_weight=1.0), batch)
    x_t, t = nets["student"].seen[0]
    assert t.tolist() == [1.0] * (2 * BSZ)
    assert torch.equal(*x_t.chunk(2))  # the noise alone, the same for both
    sigma = float(path.coeffs(t)[1][0])
    assert batch.x0 is not None
    ratios = [
        sum(
            sign * Normal(net.value, sigma).log_prob(x).flatten(1).sum(1)
            for sign, net in ((1, nets["student"]), (-1, nets["teacher"]))
        )
        for x in (batch.x0, batch.extra["rejected"])
    ]
    margin = 5.0 * 2 / math.prod(SHAPE) * (ratios[0] - ratios[1])
    torch.testing.assert_close(losses.logs["margin"], margin.detach().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses.total, -margin.sigmoid().log().mean(), rtol=1e-4, atol=1e-6)


def test_pairs_share_noise_and_time_and_all_its_times_are_met() -> None:
    method, met = made(PATHS["vp"], num_steps=4), set()
    for step in range(8):
        nets = {role: Constant(PATHS["vp"], 0.0) for role in ("student", "teacher")}
        batch = batch_of()
        method.loss(AnalyticNets(nets), batch, Ctx(step=step))
        (x_t, t), (same_x, same_t) = nets["student"].seen[0], nets["teacher"].seen[0]
        assert torch.equal(x_t, same_x)
        assert torch.equal(t, same_t)
        assert torch.equal(*t.chunk(2))
        assert batch.x0 is not None
        early = t[:BSZ] < 1.0
        alpha = method.setting.path.coeffs(t[:BSZ])[0][:, None, None].float()
        apart = x_t[:BSZ] - x_t[BSZ:] - alpha * (batch.x0 - batch.extra["rejected"])
        assert float(apart[early].abs().max() if early.any() else 0.0) < 1e-5
        met |= set(t.tolist())
    assert met == set(method.sampler().times) == set(method.sampler().trained_times or ())


def test_it_starts_at_ln_2_with_a_gradient_and_a_swap_flips_the_margin() -> None:
    method = made(PATHS["vp"], rejected_weight=1.0)
    losses, nets = loss_of(method, batch_of(), 0.1, 0.1)
    assert float(losses.total) == pytest.approx(math.log(2.0), abs=1e-6)
    assert {n: float(losses.logs[n]) for n in ("margin", "preferred", "flat")} == {
        "margin": 0.0,
        "preferred": 0.0,
        "flat": 0.0,
    }
    losses.total.backward()
    assert float(nets["student"].value.grad.abs().max()) > 0
    assert nets["teacher"].value.grad is None
    one, other = (loss_of(method, batch_of(swapped))[0] for swapped in (False, True))
    assert float(one.logs["margin"]) == pytest.approx(-float(other.logs["margin"]), abs=1e-5)


def test_the_hinge_reads_no_reference() -> None:
    losses, nets = loss_of(made(PATHS["flow"], loss="hinge"), batch_of())
    assert not nets["teacher"].seen
    assert float(losses.total) > 0


def test_weights_of_an_error() -> None:
    """snr is (alpha / sigma)^2, the released weight in Euler's sigma; else 1 / sigma^2."""
    path, batch = PATHS["vp"], batch_of()
    values = {}
    for weight in ("sigma", "snr"):
        method = made(path, num_steps=1, loss="hinge", beta=1e-9, weight=weight)
        values[weight] = float(loss_of(method, batch)[0].total) - 1.0
    alpha = float(path.coeffs(torch.ones(1))[0])
    assert values["snr"] == pytest.approx(alpha**2 * values["sigma"], abs=1e-6)
    flow = {"weight": ("sigma", "the first step of a flow path has a weight of 0 else")}
    assert PreferenceConfig.unfit({"weight": "snr"}, Abilities(path=FlowPath())) == flow
    assert PreferenceConfig.unfit({"weight": "snr"}, Abilities(path=path)) == {}
    with pytest.raises(ValueError, match=r"weight: expected sigma .* got snr, which is 0 there"):
        made(FlowPath(), weight="snr")


# ------------------------------------------------------------------------ its own times
def test_times_are_those_that_the_stock_scheduler_visits() -> None:
    """SDXL-Turbo's four, 999 to 249; and Euler's by default, whose first is not t = 1."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    trailing = EulerDiscreteScheduler(**betas, timestep_spacing="trailing")
    path = VPPath(trailing.alphas_cumprod)
    assert own_sampler(trailing, path, False, 4, 1.0).times == (1.0, 0.75, 0.5, 0.25)
    leading = EulerDiscreteScheduler(**betas, timestep_spacing="leading", steps_offset=1)
    spec = own_sampler(leading, path, False, 4, 1.0)
    assert [round(float(n)) for n in path.model_time(torch.tensor(spec.times))] == [
        751,
        501,
        251,
        1,
    ]
    assert (spec.kind, spec.keeps_scheduler, spec.trained_times) == ("ode", True, spec.times)
    lcm = own_sampler(LCMScheduler(**betas), path, False, 4, 1.0)
    assert (lcm.kind, lcm.boundary_scale) == ("renoise", 10.0)
    with pytest.raises(ValueError, match=r"num_steps: expected a number that LCMScheduler takes"):
        own_sampler(LCMScheduler(**betas), path, False, 51, 1.0)


@pytest.mark.parametrize(
    "name",
    [
        "sd",
        "flux2",
        "edm",
        *(pytest.param(n, marks=pytest.mark.full) for n in ("flux", "sd3", "wan")),
    ],
)
def test_the_stock_call_visits_the_trained_times(name, tmp_path_factory) -> None:
    family = load_family(teacher_dir(name, tmp_path_factory))
    spec = family.setting.own_sampler(3)
    subject = ["a"] if family.conditioning == "prompt" else [1]
    family.pipeline.set_progress_bar_config(disable=True)
    family.stock_call(subject, 1.0, 3, torch.Generator().manual_seed(0))
    assert visited_times(family.pipeline.scheduler, family.path) == spec.times


def test_other_steps_and_times_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps: expected 4, the tuned model's, got 2"):
        made(FlowPath()).sampler(2)
    times = made(FlowPath(), num_steps=2, student_times=(1.0, 0.5)).sampler().times
    assert times == (1.0, 0.5)
    with pytest.raises(ValueError, match=r"student_times: expected those .* got \(1.0, 0.4\)"):
        made(FlowPath(), num_steps=2, student_times=(1.0, 0.4))
    with pytest.raises(ValueError, match="student_times: expected those"):
        made(FlowPath(), student_times=(1.0, 0.5))
    told = made(FlowPath(), num_steps=2, call_times=(1.0, 0.4))
    assert told.sampler().times == (1.0, 0.4)
    assert told.grid.tolist() == [1.0, 0.4]
    for odd in ((1.0,), (0.4, 1.0), (1.1, 0.4), (1.0, 0.0)):
        with pytest.raises(ValueError, match="call_times: expected 2 descending times"):
            made(FlowPath(), num_steps=2, call_times=odd)


def test_the_facts_of_a_folder_know_its_times(tmp_path_factory) -> None:
    folder = teacher_dir("sd", tmp_path_factory)
    own = teacher_facts(folder).setting.own_sampler(3)
    assert own == load_family(folder).setting.own_sampler(3)


@pytest.mark.parametrize(("loss", "warned"), [("hinge", False), ("logistic", True)])
def test_a_prior_s_weight_is_warned_of_where_no_loss_reads_it(loss, warned) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        PreferenceConfig(loss=loss, prior_weight=0.7)
    assert any("prior_weight has no effect" in str(one.message) for one in found) == warned
