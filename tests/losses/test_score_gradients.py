"""Score gradients of a renderer: each row against its formula on analytic teachers, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from stepdistill.core.path import FlowPath, NoisePath, VPPath, expand
from stepdistill.core.types import Cond
from stepdistill.losses.score import (
    LATE,
    balanced,
    ddim_inverted,
    gradient_times,
    score_grad,
    summed_surrogate,
)
from stepdistill.losses.score_options import GRADIENT_KINDS, ScoreGradientConfig, annealed
from stepdistill.testing.analytic import AnalyticDenoiser, GaussianTeacher

VP = VPPath.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2)
PATHS: dict[str, NoisePath] = {"vp": VP, "flow": FlowPath()}
SHAPE, STD = (4, 2, 3, 3), 0.7


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X0, NOISE, T = draw(0), draw(1), torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
CONDS = {name: Cond({"mean": draw(i)}) for i, name in enumerate(("cond", "null", "neg", "empty"))}
FAKE = GaussianTeacher(VP, 0.3)


@pytest.fixture(params=list(PATHS))
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def gradient(path: NoisePath, net: Any = None, **options: Any) -> Tensor:
    """score_grad of the Gaussian teacher at X0, NOISE, T under CONDS."""
    more = {k: options.pop(k) for k in ("fake", "fake_cond", "step", "x0") if k in options}
    x0 = more.pop("x0", X0)
    teacher = net or GaussianTeacher(path, STD)
    conds = {"negative": CONDS["neg"], "empty": CONDS["empty"]}
    config = ScoreGradientConfig(**options)
    return score_grad(teacher, x0, T, NOISE, CONDS["cond"], CONDS["null"], config, **conds, **more)


def eps(path: NoisePath, name: str, x0: Tensor = X0, net: Any = None) -> Tensor:
    """A closed-form noise prediction at x_t: sigma (x_t - alpha mu) / V."""
    alpha, sigma = (expand(c, x0) for c in path.coeffs(T))
    x_t = alpha * x0 + sigma * NOISE
    return sigma * (x_t - alpha * CONDS[name]["mean"]) / (alpha**2 * STD**2 + sigma**2)


def coeffs(path: NoisePath) -> tuple[Tensor, Tensor]:
    alpha, sigma = (expand(c, X0) for c in path.coeffs(T))
    return alpha, sigma


def test_every_row_is_its_formula(path: NoisePath) -> None:
    """The card of each paper, written out: e_c, e_u, e_0, e_n under four conditions."""
    (alpha, sigma), late = coeffs(path), expand((T > 0.2).double(), X0)
    c, u, n, o = (eps(path, name) for name in ("cond", "null", "neg", "empty"))
    fake = GaussianTeacher(path, 0.3)
    e_f = fake(path.add_noise(X0, NOISE, T), T, CONDS["cond"]).eps
    wanted = {
        "sds": sigma**2 * (u + 7 * (c - u) - NOISE),
        "vsd": sigma**2 * (u + 7 * (c - u) - e_f),
        "csd": sigma**2 * (c + (0.5 - 1) * u - 0.5 * n),
        "nfsd": sigma**2 * (o - late * n + 7 * (c - n)),
        "recon": sigma / alpha * (u + 7 * (c - u) - NOISE),
        "dreammat": sigma**2 * (1.05 * c - 0.75 * u - 0.25 * o),
    }
    for kind, value in wanted.items():
        made = gradient(path, kind=kind, guidance=7, fake=fake, step=1000)
        torch.testing.assert_close(made, value, rtol=1e-8, atol=1e-9, msg=kind)


def test_nfsd_of_a_time_at_its_limit_is_not_late() -> None:
    t = torch.full((4,), LATE, dtype=torch.float64)
    config = ScoreGradientConfig(kind="nfsd", guidance=7, weight="uniform")
    conds = {"negative": CONDS["neg"], "empty": CONDS["empty"]}
    teacher, path = GaussianTeacher(FlowPath(), STD), FlowPath()
    made = score_grad(teacher, X0, t, NOISE, CONDS["cond"], CONDS["null"], config, **conds)
    x_t = path.add_noise(X0, NOISE, t)
    c, n, o = (teacher(x_t, t, CONDS[name]).eps for name in ("cond", "neg", "empty"))
    torch.testing.assert_close(made, o + 7 * (c - n))


def test_csd_without_a_negative_prompt_is_the_classifier_term(path: NoisePath) -> None:
    config, teacher = ScoreGradientConfig(kind="csd", weight="uniform"), GaussianTeacher(path, STD)
    made = score_grad(teacher, X0, T, NOISE, CONDS["cond"], CONDS["null"], config)
    torch.testing.assert_close(made, eps(path, "cond") - eps(path, "null"), rtol=1e-8, atol=1e-9)


def test_csm_is_the_classifier_term_where_ddim_inversion_ends(path: NoisePath) -> None:
    teacher = GaussianTeacher(path, STD)
    x_t = ddim_inverted(teacher, X0, T, CONDS["null"], 10)
    e_c, e_u = (teacher(x_t, T, CONDS[name]).eps for name in ("cond", "null"))
    made = gradient(path, kind="csm")
    torch.testing.assert_close(made, coeffs(path)[1] ** 2 * (e_c - e_u))


def test_ddim_inversion_ends_at_the_very_time_that_was_asked() -> None:
    teacher, null = GaussianTeacher(VP, STD), CONDS["null"]
    between = T + 0.0004  # no entry of the table
    noise = teacher(VP.add_noise(X0, torch.zeros_like(X0), between), between, null).eps
    made = ddim_inverted(teacher, X0, between, null, 1)
    torch.testing.assert_close(made, VP.add_noise(X0, noise, between), rtol=0, atol=0)


def test_ddim_inversion_converges_to_the_exact_trajectory(path: NoisePath) -> None:
    teacher, null = GaussianTeacher(path, STD), CONDS["null"]
    alpha, sigma = coeffs(path)
    spread = (alpha**2 + sigma**2 / STD**2).sqrt()
    exact = alpha * null["mean"] + spread * (X0 - null["mean"])
    errors = [
        float((ddim_inverted(teacher, X0, T, null, n) - exact).abs().max()) for n in (12, 25, 50)
    ]
    share = 0.6 if isinstance(path, FlowPath) else 1.0  # a table's steps are not all equal
    assert errors[2] < share * errors[1] < share**2 * errors[0]
    assert errors[2] < 0.1


def test_bsd_is_the_shortest_mean_of_its_two_directions(path: NoisePath) -> None:
    towards, smooth = 15 * (eps(path, "cond") - eps(path, "null")), eps(path, "null")
    dims = (1, 2, 3)
    made = gradient(path, kind="bsd", weight="uniform")
    for share in torch.linspace(0, 1, 11, dtype=torch.float64):
        other = share * towards + (1 - share) * smooth
        assert bool((made.square().sum(dims) <= other.square().sum(dims) + 1e-12).all())
    assert bool(((made * towards).sum(dims) >= -1e-9).all())
    assert bool(((made * smooth).sum(dims) >= -1e-9).all())
    torch.testing.assert_close(gradient(path, kind="bsd"), coeffs(path)[0] * made)


def test_bsd_of_equal_directions_is_that_one() -> None:
    assert torch.equal(balanced(X0, X0), X0)


def test_recon_is_sds_over_the_signal_and_the_way_to_the_guided_x0(path: NoisePath) -> None:
    alpha, sigma = coeffs(path)
    recon = gradient(path, kind="recon", guidance=7)
    sds = gradient(path, kind="sds", guidance=7, weight="uniform")
    torch.testing.assert_close(recon, sigma / alpha * sds, rtol=1e-10, atol=1e-12)
    x_t = path.add_noise(X0, NOISE, T)
    teacher = GaussianTeacher(path, STD)
    guided = teacher(x_t, T, CONDS["cond"], CONDS["null"], 7.0).x0
    torch.testing.assert_close(recon, X0 - guided, rtol=1e-8, atol=1e-9)


def test_recon_rescaled_takes_the_spread_of_the_conditional_x0(path: NoisePath) -> None:
    made = X0 - gradient(path, kind="recon", guidance=7, rescale=1.0)
    teacher = GaussianTeacher(path, STD)
    plain = teacher(path.add_noise(X0, NOISE, T), T, CONDS["cond"]).x0
    torch.testing.assert_close(made.std((1, 2, 3)), plain.std((1, 2, 3)), rtol=1e-8, atol=0)
    guided = X0 - gradient(path, kind="recon", guidance=7)
    ratio = plain.std((1, 2, 3), keepdim=True) / guided.std((1, 2, 3), keepdim=True)
    torch.testing.assert_close(made, ratio * guided, rtol=1e-8, atol=1e-9)
    half = X0 - gradient(path, kind="recon", guidance=7, rescale=0.5)
    torch.testing.assert_close(half, (0.5 * ratio + 0.5) * guided, rtol=1e-8, atol=1e-9)


def test_vsd_is_zero_with_a_perfect_fake_and_sds_with_one_that_answers_the_noise(path) -> None:
    teacher = GaussianTeacher(path, STD)
    assert not gradient(path, kind="vsd", guidance=1, fake=teacher).any()

    class Oracle(AnalyticDenoiser):
        def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return X0

    vsd = gradient(path, kind="vsd", guidance=7, fake=Oracle(path))
    torch.testing.assert_close(vsd, gradient(path, kind="sds", guidance=7), rtol=1e-8, atol=1e-9)


def test_the_mean_gradient_of_sds_ends_at_the_mode_and_vsd_knows_the_spread() -> None:
    """Samples at the mean: SDS wants nothing more, VSD spreads them as long as its fake is one."""
    path, mean = FlowPath(), torch.zeros(4096, 1, 1, 1, dtype=torch.float64)
    cond = Cond({"mean": mean})
    t, noise = torch.full((4096,), 0.5, dtype=torch.float64), draw(5, (4096, 1, 1, 1))
    teacher, narrow = GaussianTeacher(path, 1.0), GaussianTeacher(path, 1e-6)
    sds = ScoreGradientConfig(kind="sds", guidance=1.0, weight="uniform")
    vsd = sds.model_copy(update={"kind": "vsd"})
    assert abs(float(score_grad(teacher, mean, t, noise, cond, cond, sds).mean())) < 0.02
    spread = draw(6, (4096, 1, 1, 1))
    for x0, fake, sign in ((mean, narrow, -1), (3 * spread, GaussianTeacher(path, 3.0), 1)):
        grad = score_grad(teacher, x0, t, noise, cond, cond, vsd, fake=fake)
        x_t = path.add_noise(x0, noise, t)
        assert sign * float((grad * x_t).mean()) > 0.1  # away from the mean, or back to it


@pytest.mark.parametrize("kind", ["csd", "csm", "sds", "vsd", "recon"])
def test_rows_that_sum_to_zero_do_not_feel_a_constant_in_every_prediction(kind: str, path) -> None:
    class Shifted(GaussianTeacher):
        def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            alpha, sigma = (expand(c, x_t) for c in self.path.coeffs(t))
            return super().posterior_mean(x_t, t, cond) - 0.4 * sigma / alpha

    plain, shifted = GaussianTeacher(path, STD), Shifted(path, STD)
    teachers = (plain, shifted)
    fakes = (GaussianTeacher(path, 0.3), Shifted(path, 0.3))
    same = [gradient(path, net, kind=kind, fake=f) for net, f in zip(teachers, fakes, strict=True)]
    off = (same[1] - same[0]).abs().max()
    if kind in ("sds", "recon"):  # the drawn noise is no prediction
        assert off > 1e-3
    elif kind == "csm":  # its x_t is the shifted network's own
        assert off < 0.5
    else:
        assert off < 1e-9


def test_dreammat_s_coefficients_sum_to_a_twentieth_at_every_step() -> None:
    c = ScoreGradientConfig(kind="dreammat").coefficients
    for step in (0, 500, 1999, 2000, 9000):
        assert sum(annealed(one, step) for one in c) == pytest.approx(0.05)


@pytest.mark.parametrize("kind", GRADIENT_KINDS)
def test_gradients_are_bounded_have_no_graph_and_lead_through_a_linear_autoencoder(kind) -> None:
    """d loss / d pixels = weights^T grad / B."""
    weights = draw(9, (18, 27))
    pixels = draw(10, (4, 27)).requires_grad_()
    latents = (pixels @ weights.T).view(4, 2, 3, 3)
    grad = gradient(VP, kind=kind, fake=FAKE, x0=latents, max_gradient=0.2)
    assert not grad.requires_grad
    whole = gradient(VP, kind=kind, fake=FAKE, x0=latents)
    assert torch.equal(grad, whole.clamp(-0.2, 0.2))
    assert float(grad.min()) < 0.0 < float(grad.max()) <= 0.2
    summed_surrogate(latents, grad).backward()
    torch.testing.assert_close(pixels.grad, grad.view(4, -1) @ weights / 4)


def test_weights_over_noise_levels(path: NoisePath) -> None:
    alpha, sigma = coeffs(path)
    plain = gradient(path, kind="csd", weight="uniform")
    for weight, factor in {
        "sigma2": sigma**2,
        "fantasia3d": alpha * sigma**2,
        "ism": sigma / alpha,
        "alpha": alpha,
    }.items():
        made = gradient(path, kind="csd", weight=weight)
        torch.testing.assert_close(made, factor * plain, msg=weight)


def test_a_condition_given_twice_is_run_once_and_all_in_one_call() -> None:
    calls = []

    class Counting(GaussianTeacher):
        def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
            calls.append(len(x_t))
            return super().posterior_mean(x_t, t, cond)

    net, config = Counting(VP, STD), ScoreGradientConfig(kind="nfsd")
    score_grad(net, X0, T, NOISE, CONDS["cond"], CONDS["null"], config, negative=CONDS["null"])
    assert calls == [8]


def test_what_a_kind_needs_is_asked_for() -> None:
    net, conds = GaussianTeacher(VP, STD), (CONDS["cond"], CONDS["null"])
    for kind, rule in {"vsd": "expected a fake", "nfsd": "expected a negative prompt"}.items():
        with pytest.raises(ValueError, match=rf"^{kind}: {rule}"):
            score_grad(net, X0, T, NOISE, *conds, ScoreGradientConfig(kind=kind))
    net.has_null = False
    with pytest.raises(ValueError, match=r"^csd: expected a network with a null condition"):
        score_grad(net, X0, T, NOISE, *conds, ScoreGradientConfig(kind="csd"))
    score_grad(net, X0, T, NOISE, *conds, ScoreGradientConfig(kind="sds", guidance=1))


def test_networks_told_the_guidance_answer_one_guided_prediction() -> None:
    class Told(GaussianTeacher):
        embeds_guidance = True

        def raw(self, x_t, t, cond, w, features):  # type: ignore[no-untyped-def]
            self.told = w
            return super().raw(x_t, t, cond, w, features)

    net, conds = Told(VP, STD), (CONDS["cond"], CONDS["null"])
    config = ScoreGradientConfig(kind="sds", guidance=3.5, weight="uniform")
    made = score_grad(net, X0, T, NOISE, *conds, config)
    assert net.told is not None
    assert net.told.tolist() == [2.5] * 4
    torch.testing.assert_close(made, eps(VP, "cond") - NOISE, rtol=1e-8, atol=1e-9)
    with pytest.raises(ValueError, match=r"^bsd: .* is told the guidance\. Use sds, vsd or recon"):
        score_grad(net, X0, T, NOISE, *conds, ScoreGradientConfig(kind="bsd"))


@pytest.mark.parametrize(
    ("value", "at"),
    [
        (0.3, {0: 0.3, 99: 0.3}),
        ((0.5, 0.1, 500), {0: 0.5, 250: 0.3, 500: 0.1, 900: 0.1}),
        ((500, 0.2, 0.02, 501), {0: 0.2, 500: 0.2, 501: 0.02}),
        ((0, 2, 8, 1000, 4, 2000), {0: 2, 500: 5, 1000: 8, 1500: 6, 2500: 4}),
    ],
)
def test_annealed_numbers(value, at) -> None:
    for step, wanted in at.items():
        assert annealed(value, step) == pytest.approx(wanted)


@pytest.mark.parametrize("value", [(1, 2), (0, 1, 2, 3, 4), (5, 0, 1, 5), (0, 1, 2, 9, 3, 8)])
def test_annealed_numbers_of_no_form_are_refused(value) -> None:
    with pytest.raises(ValidationError, match="annealed value: expected"):
        ScoreGradientConfig(negative_weight=value)


def test_times_are_annealed_and_stay_on_the_table() -> None:
    config = ScoreGradientConfig(max_t=(5000, 0.98, 0.5, 5001))
    share = torch.linspace(0, 0.999, 50, dtype=torch.float64)
    early, late = (gradient_times(VP, share, config, step, 9000) for step in (5000, 5001))
    assert (float(early.min()), float(late.max())) == (0.02, 0.5)
    assert 0.97 < float(early.max()) <= 0.98
    assert torch.equal(VP.snap(early), early)


def test_times_may_fall_with_the_root_of_the_steps_done() -> None:
    config = ScoreGradientConfig(times="sqrt_anneal", min_t=0.2, max_t=0.8)
    share = torch.rand(3, dtype=torch.float64)
    for step, t in {0: 0.8, 25: 0.5, 100: 0.2}.items():
        made = gradient_times(FlowPath(), share, config, step, 100)
        torch.testing.assert_close(made, torch.full((3,), t, dtype=torch.float64))


@pytest.mark.parametrize("times", [{"min_t": 0.5, "max_t": 0.5}, {"max_t": 1.0}])
def test_times_may_be_one_and_end_at_noise(times) -> None:
    ScoreGradientConfig(**times)


@pytest.mark.parametrize(
    "times",
    [
        {"min_t": 0.0},
        {"min_t": 0.6, "max_t": (0.98, 0.5, 10)},
        {"min_t": 0.6, "max_t": (0.98, 0.5, 10**6)},
    ],
)
def test_times_out_of_order_are_refused(times) -> None:
    with pytest.raises(ValidationError, match="min_t, max_t: expected 0 < min_t <= max_t <= 1"):
        ScoreGradientConfig(**times)
