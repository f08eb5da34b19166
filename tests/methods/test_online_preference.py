"""online_preference on analytic policies: exact log-ratios of the steps that a sampler draws."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from support.score import PATHS
from torch import Tensor, nn
from torch.distributions import Normal

from stepdistill.core.context import Ctx
from stepdistill.core.method import Scorer, Setting
from stepdistill.core.path import NoisePath, VPPath
from stepdistill.core.solvers import SamplerSpec
from stepdistill.core.types import Batch, Cond
from stepdistill.losses.preference import log_ratio, online
from stepdistill.methods.online_preference import OnlinePreference
from stepdistill.methods.online_preference_config import OnlinePreferenceConfig
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets

BSZ, SHAPE = 3, (3, 2, 2)


class Towards(AnalyticDenoiser, nn.Module):
    """x0hat = a x_t + b: the noise that was drawn is seen in what follows."""

    def __init__(self, path: NoisePath, offset: float) -> None:
        nn.Module.__init__(self)
        AnalyticDenoiser.__init__(self, path)
        self.offset = nn.Parameter(torch.full(SHAPE, offset))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.seen.append((x_t.detach(), t))
        return 0.3 * x_t + self.offset.to(x_t)


def setting(path: NoisePath, kind: Any) -> Setting:
    def own(num_steps: int, shift: float) -> SamplerSpec:
        times = tuple(1.0 - i / num_steps for i in range(num_steps))
        return SamplerSpec(times, kind, times, keeps_scheduler=True)

    return Setting(path, "x0", own=own)


def mean(images: Tensor, by: object) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def ran(
    path: NoisePath,
    kind: str,
    student: float = 0.2,
    teacher: float = 0.2,
    judge: Scorer = mean,
    **options: Any,
) -> tuple[Any, dict[str, Towards], OnlinePreference]:
    options = {"num_steps": 3, "reward": {"kind": "mean"}, "beta": 1.0, **options}
    method = OnlinePreference(OnlinePreferenceConfig(**options), setting(path, kind))
    nets = {"student": Towards(path, student), "teacher": Towards(path, teacher)}
    cond = Cond({"mean": torch.zeros(BSZ, *SHAPE)})
    bank: Any = AnalyticNets(nets, scorers={"mean": judge})
    losses = method.loss(bank, Batch(cond, cond, SHAPE), Ctx())
    return losses, nets, method


@pytest.mark.parametrize("kind", ["renoise", "ode"])
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_log_ratios_are_those_of_the_drawn_steps(name: str, kind: str) -> None:
    """Of all steps but the last, by torch.distributions."""
    path = PATHS[name]
    losses, nets, method = ran(path, kind, 0.2, 0.25, clip=0.999, trained_steps="all")
    states = [x for x, _ in nets["student"].seen[:3]]  # the trajectory, without its x0
    ratios = []
    for step, (x_t, later) in enumerate(pairwise(states)):
        t, s = (
            torch.full((2 * BSZ,), v, dtype=torch.float64) for v in method.spec.times[step:][:2]
        )
        (a_t, s_t), (a_s, s_s) = path.coeffs(t), path.coeffs(s)
        logs = []
        for net in nets.values():
            x0 = 0.3 * x_t + net.offset.detach()
            std, eps = s_s, (x_t - _by(a_t) * x0) / _by(s_t)
            mu = _by(a_s) * x0
            if kind == "ode":  # DDIM at eta 1, which is Euler ancestral's sigma_up
                std = s_s * (1 - (s_s / a_s) ** 2 / (s_t / a_t) ** 2).sqrt()
                mu = mu + _by((s_s**2 - std**2).sqrt()) * eps
            logs.append(Normal(mu, _by(std)).log_prob(later).flatten(1).mean(1))
            if net is nets["student"]:  # what it drew is a unit normal
                drawn = (later - mu) / _by(std)
                assert 0.7 < float(drawn.std()) < 1.3
                assert float(drawn.abs().max()) < 5.0
        ratios.append(logs[0] - logs[1])
    x0 = 0.3 * states[-1] + nets["student"].offset.detach()
    score = mean(x0.clamp(-1, 1), None)
    won = (score[:BSZ] - score[BSZ:]).sign()
    wanted = [-(won * (r[:BSZ] - r[BSZ:])).sigmoid().log().mean() for r in ratios]
    torch.testing.assert_close(
        losses.total.double(), torch.stack(wanted).mean().double(), rtol=1e-4, atol=1e-5
    )


def _by(coefficient: Tensor) -> Tensor:
    return coefficient.float()[:, None, None, None]


def test_the_noise_of_a_deterministic_scheduler_is_euler_ancestral_s() -> None:
    """sigma_up^2 = s'^2 (s^2 - s'^2) / s^2 in the stock scheduler's own sigma = noise / signal."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    stock = EulerAncestralDiscreteScheduler(**betas, timestep_spacing="trailing")
    stock.set_timesteps(4)
    path = VPPath(stock.alphas_cumprod)
    own = lambda n, shift: SamplerSpec((1.0, 0.75, 0.5, 0.25), "ode", keeps_scheduler=True)  # noqa: E731
    method = OnlinePreference(OnlinePreferenceConfig(num_steps=4), Setting(path, "x0", own=own))
    net = Towards(path, 0.0)
    for step in range(3):
        old, new = (float(stock.sigmas[step + i]) for i in range(2))
        up = (new**2 * (old**2 - new**2) / old**2) ** 0.5
        x_t = torch.randn(1, *SHAPE)
        _, std = method._step(net, x_t, step, Cond({}))
        alpha = float(path.coeffs(torch.tensor([method.spec.times[step + 1]]))[0])
        assert float(std) == pytest.approx(alpha * up, rel=1e-4)


def test_it_starts_at_ln_2_and_one_step_makes_winners_likelier() -> None:
    losses, nets, _ = ran(PATHS["vp"], "renoise")
    assert losses.total.item() == pytest.approx(math.log(2.0), abs=1e-6)
    losses.total.backward()
    assert nets["teacher"].offset.grad is None
    gradient = nets["student"].offset.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0
    again, _, _ = ran(PATHS["vp"], "renoise", beta=1e4)  # the margin by its sign alone
    assert float(again.logs["margin"]) == 0.0
    # What the winners drew lies farther along their noise than the losers': mu moves there.
    ratio = torch.tensor([0.02, 0.0, -0.02, 0.0])
    won = torch.tensor([1.0, -1.0])
    moved, margin, _ = online(ratio, won, 10.0, 0.1)
    assert (margin > 0).tolist() == [True, False]
    assert float(moved[0]) < math.log(2.0) == pytest.approx(float(moved[1]))


def test_ties_and_far_ratios_have_no_gradient() -> None:
    ratio = torch.tensor([0.5, 0.01, -0.5, 0.0], requires_grad=True)
    losses, _, clipped = online(ratio, torch.tensor([1.0, 0.0]), 50.0, 0.1)
    losses.sum().backward()
    assert ratio.grad is not None
    assert ratio.grad.tolist() == [0.0, 0.0, 0.0, 0.0]
    assert losses.tolist()[1] == 0.0
    assert clipped.tolist() == [True, False, True, False]
    losses, _, _ = ran(PATHS["flow"], "ode", judge=lambda images, by: torch.zeros(len(images)))
    assert float(losses.logs["tied"]) == 1.0
    assert float(losses.total) == 0.0


def test_swapping_the_pair_flips_the_margin() -> None:
    ratio, won = torch.tensor([0.03, -0.01]), torch.tensor([1.0])
    (_, one, _), (_, other, _) = online(ratio, won, 5.0, 0.1), online(ratio, -won, 5.0, 0.1)
    assert float(one) == -float(other) == pytest.approx(5.0 * 0.04)
    later, mu, before = torch.randn(3, 2, *SHAPE).unbind(0)
    std = torch.tensor(0.7)
    exact = (Normal(mu, std).log_prob(later) - Normal(before, std).log_prob(later)).flatten(1)
    torch.testing.assert_close(log_ratio(later, mu, before, std), exact.mean(1))


def test_one_step_models_have_nothing_to_learn_from() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        OnlinePreferenceConfig(num_steps=1)
