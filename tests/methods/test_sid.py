"""sid against closed forms: its laws of mean and spread, the graph through both, guidance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from support.score import BSZ, PATHS, VP, Leaf, Net, NetDenoiser, Recorder, batch_of, closed_form
from torch import Tensor

from stepdistill.config.run import RunConfig
from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath
from stepdistill.losses.score import dmd_gradient, score_identity
from stepdistill.methods.sid import SiD, SiDConfig
from stepdistill.testing.analytic import AnalyticNets, GaussianTeacher

CONFIG = Path(__file__).parents[2] / "configs" / "methods" / "sid.yaml"


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def make(path: NoisePath = VP, **options: Any) -> SiD:
    config = {"guidance": 1.0, "student_times": (0.4,), **options}
    return SiD(SiDConfig(**config), Setting(path, "x0"))


def nets_of(path: NoisePath, fake: Denoiser | None = None) -> tuple[Leaf, AnalyticNets]:
    x0 = torch.randn(BSZ, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf, teacher = Leaf(path, x0), Recorder(GaussianTeacher(path, 0.6))
    return leaf, AnalyticNets({"student": leaf, "teacher": teacher, "fake": fake or teacher})


def student_loss(method: SiD, nets: AnalyticNets, ctx: Ctx | None = None) -> Any:
    return method.phases(0)[-1].loss(nets, batch_of(), ctx or Ctx(phase="student"))


# ----------------------- a Gaussian student N(m, s^2), teacher N(mu, c^2), the fake exact: expected
# loss and gradients by Gauss-Hermite quadrature, which is exact for what is quadratic in (z, eps)
def expected(
    alpha: float,
    m: float,
    s: float,
    mu: float = 0.3,
    c: float = 0.8,
    a: float = 0.7,
    b: float = 0.5,
) -> tuple[float, float, float]:
    """(E[L], dE[L]/dm, dE[L]/ds) without the normaliser, at x_t = a x + b eps."""
    nodes, weights = (torch.tensor(v) for v in np.polynomial.hermite_e.hermegauss(5))
    z, eps = (v.reshape(-1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).reshape(-1) / (2 * torch.pi)
    mean, std = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (m, s))
    x = mean + std * z
    x_t = a * x + b * eps

    def denoised(centre: float, spread: float) -> Tensor:
        return centre + a * spread**2 / (a**2 * spread**2 + b**2) * (x_t - a * centre)

    real, fake = denoised(mu, c), denoised(m, s)
    norm = (x - real).detach().abs().mean(1).clamp_min(1e-5)
    total = (weight * norm * score_identity(x, real, fake, alpha)).sum()
    total.backward()
    assert mean.grad is not None
    assert std.grad is not None
    return float(total.detach()), float(mean.grad), float(std.grad)


def gain(spread: float, a: float = 0.7, b: float = 0.5) -> float:
    return a * spread**2 / (a**2 * spread**2 + b**2)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2, 2.0])
def test_the_mean_moves_to_the_teachers_whatever_alpha_is(alpha: float) -> None:
    _, slope, _ = expected(alpha, m=1.1, s=0.8)
    assert slope == pytest.approx((1 - 0.7 * gain(0.8)) ** 2 * (1.1 - 0.3), rel=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2, 2.0])
@pytest.mark.parametrize("s", [0.4, 1.3])
def test_the_spread_follows_the_closed_form(alpha: float, s: float) -> None:
    _, _, slope = expected(alpha, m=0.3, s=s)
    real, fake = gain(0.8), gain(s)
    law = 2 * 0.7 * s * (real - fake) * (0.7 * real * (1 - alpha) + alpha * 0.7 * fake - 1)
    assert slope == pytest.approx(law, rel=1e-9)


@pytest.mark.parametrize(("alpha", "ratio", "runs_away"), [
    (1.0, 1e3, False), (1.2, 5.5, False), (1.2, 6.5, True), (2.0, 1.9, False), (2.0, 2.1, True),
])  # fmt: skip
def test_the_spread_runs_away_above_alpha_over_alpha_minus_one(alpha, ratio, runs_away) -> None:
    """V_f / V_r of the noised variances; a step goes against the slope."""
    noised = ratio * (0.7**2 * 0.8**2 + 0.5**2)
    s = ((noised - 0.5**2) / 0.7**2) ** 0.5
    assert (expected(alpha, m=0.3, s=s)[2] < 0) == runs_away


def test_the_loss_has_the_sign_of_one_minus_alpha_at_an_exact_fake() -> None:
    losses = [expected(alpha, m=0.9, s=0.5)[0] for alpha in (0.5, 1.0, 1.5)]
    assert losses[0] > 1e-3
    assert losses[1] == pytest.approx(0.0, abs=1e-12)
    assert losses[2] == pytest.approx(-losses[0], rel=1e-9)


# ------------------------------------------------------------------------------------- the method
def test_no_loss_and_no_gradient_where_the_fake_is_the_teacher(path: NoisePath) -> None:
    leaf, nets = nets_of(path)
    losses = student_loss(make(path, alpha=1.2), nets)
    losses.total.backward()
    assert float(losses.total) == 0.0
    assert leaf.x0.grad is not None
    assert torch.count_nonzero(leaf.x0.grad) == 0


@pytest.mark.parametrize("alpha", [1.0, 1.2])
def test_the_gradient_goes_through_both_scores(path: NoisePath, alpha: float) -> None:
    """It is the derivative of the closed form, and not DMD's, which detached scores give."""
    leaf, nets = nets_of(path, GaussianTeacher(path, 0.9))
    method = make(path, alpha=alpha)
    student_loss(method, nets).total.backward()
    x0, (real, fake) = closed_form(method, nets, path, leaf, 0.6, 0.9)
    norm = (x0 - real).detach().abs().mean(1, keepdim=True).clamp_min(1e-5)
    ((real - fake) * ((real - x0) - alpha * (real - fake)) / norm).mean().backward()
    torch.testing.assert_close(leaf.x0.grad, x0.grad, rtol=1e-5, atol=1e-9)
    dmd = dmd_gradient(x0, real, fake) / x0.numel()
    assert not torch.allclose(leaf.x0.grad, dmd, rtol=0.1)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_without_that_graph_it_would_be_dmds_gradient(alpha: float) -> None:
    x0, real, fake = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    x0.requires_grad_()
    score_identity(x0, real, fake, alpha).mean().backward()
    expected_ = dmd_gradient(x0, real, fake) / x0.numel()
    torch.testing.assert_close(x0.grad, expected_.to(x0), rtol=1e-5, atol=1e-7)


def test_the_weights_of_both_scores_may_stay_frozen() -> None:
    """Only x_t needs the graph."""
    roles = [NetDenoiser(VP, Net(seed).requires_grad_(False)) for seed in (1, 2)]
    leaf = Leaf(VP, torch.ones(BSZ, 2))
    nets = AnalyticNets({"student": leaf, "teacher": roles[0], "fake": roles[1]})
    student_loss(make(), nets).total.backward()
    assert leaf.x0.grad is not None
    assert leaf.x0.grad.abs().min() > 0


def test_the_fake_learns_first() -> None:
    phases = make().phases(0)
    assert [phase.name for phase in phases] == ["fake", "student"]
    assert [phase.trains for phase in phases] == [("fake",), ("student",)]
    assert make(warm_start={"updates": 1}).phases(0)[1].loss.__name__ == "warm_loss"


# -------------------------------------------------------------------------- guidance of the fake
def calls(**options: Any) -> dict[str, list[float]]:
    """Mean of the first column of the conditions that a student update and a fake's ask for."""
    roles = {name: Recorder(GaussianTeacher(FlowPath(), 0.6)) for name in ("teacher", "fake")}
    leaf, _ = nets_of(FlowPath())
    nets, method = AnalyticNets({"student": leaf, **roles}), make(FlowPath(), **options)
    student_loss(method, nets)
    method.phases(0)[0].loss(nets, batch_of(), Ctx(phase="fake"))
    return {k: [float(c["mean"][:, 0].mean()) for _, _, c, _ in v.calls] for k, v in roles.items()}


def test_the_teacher_alone_is_guided_by_default() -> None:
    plain, guided = (
        (BSZ - 1) / 2,
        (BSZ - 1) / 4,
    )  # null rows are zeros, in one batch with the others
    assert calls(guidance=3.0) == {"teacher": [guided], "fake": [plain, plain]}


def test_long_short_guides_the_fake_where_it_is_read_and_fitted() -> None:
    guided = (BSZ - 1) / 4
    seen = calls(guidance=3.0, fake_guidance="long_short", null_probability=0.0)
    assert seen == {"teacher": [guided], "fake": [guided, guided]}
    method = make(guidance=3.0, fake_guidance="long_short")
    assert (method.fitted_guidance, method.guidances(3.0)) == (3.0, (3.0, 3.0))
    assert method.teacher_guidance == 3.0


def test_zero_cfg_shows_the_fake_no_prompt() -> None:
    plain = (BSZ - 1) / 2
    assert calls(fake_guidance="zero_cfg") == {"teacher": [plain], "fake": [0.0, 0.0]}
    assert make(fake_guidance="zero_cfg").reads_null == "fake_guidance zero_cfg"
    assert make(fake_guidance="long_short").reads_null == ""


def test_a_tenth_of_the_samples_lose_their_prompt_under_long_short() -> None:
    method, batch = make(fake_guidance="long_short", null_probability=0.1), batch_of(4000)
    cond = method.fake_cond(batch.cond, batch.null, Ctx(phase="fake"))
    lost = (cond["mean"][1:, 0] == 0).float().mean()
    assert float(lost) == pytest.approx(0.1, abs=0.015)  # three deviations
    kept = cond["mean"][:, 0] != 0
    assert torch.equal(cond["mean"][kept], batch.cond["mean"][kept])
    assert make().fake_cond(batch.cond, batch.null, Ctx()) is batch.cond


# ------------------------------------------------------------------------------------ the options
def test_zero_cfg_beside_a_guided_teacher_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"guidance 1 beside zero_cfg, got 2.*Set guidance"):
        SiDConfig(guidance=2.0, fake_guidance="zero_cfg")


def test_a_weight_of_dmds_is_told_to_do_nothing() -> None:
    with pytest.warns(UserWarning, match="weight 'uniform' has no effect"):
        SiDConfig(weight="uniform")


def test_shipped_config_is_valid() -> None:
    run = RunConfig(pretrained_model_name_or_path="m", **yaml.safe_load(CONFIG.read_text()))
    config = SiDConfig(**run.method_config)
    assert (config.alpha, config.fake_guidance, config.student_times) == (
        1.0,
        "long_short",
        (0.626,),
    )
    a, b = VP.coeffs(torch.tensor([0.626], dtype=torch.float64))
    assert float(b / a) == pytest.approx(2.5, abs=0.02)  # SiD's first sigma on EDM


def test_weights_of_samples_multiply_their_losses(path: NoisePath) -> None:
    method, (_, nets) = make(path), nets_of(path, GaussianTeacher(path, 0.9))
    ctx = Ctx(phase="student")
    sample = method.sample(nets, batch_of(), ctx)
    scores = method.scores(nets, batch_of(), ctx, sample)
    each = score_identity(sample.x0, scores.real.x0, scores.fake.x0, method.config.alpha)
    weights = torch.linspace(0.5, 2.0, len(each), dtype=each.dtype)
    weights = weights.view(-1, *([1] * (each.ndim - 1)))
    torch.testing.assert_close(method.matching(sample, scores, weights), (weights * each).mean())
