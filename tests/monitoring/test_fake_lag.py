"""The lag of a fake score against its closed form on Gaussians, and a run whose fake never learns.

Student N(m_s, std^2), fake the posterior mean of N(m_f, std^2), teacher guided to N(m_r, std^2):
all differences of posterior means are the same multiple of differences of the means, so
lag = (m_s - m_f) (m_f - m_r) / (m_f - m_r)^2.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from stepdistill.config.files import method_class
from stepdistill.config.watchdog import WatchdogConfig
from stepdistill.config.yaml_files import read_yaml
from stepdistill.core.method import FakeFit, Setting
from stepdistill.core.path import FlowPath
from stepdistill.core.types import Cond
from stepdistill.losses.score import dmd_gradient
from stepdistill.monitoring.fake_lag import LAG_TIMES, lag_of, lag_terms
from stepdistill.monitoring.sample_checks import SampleChecks
from stepdistill.testing.analytic import GaussianTeacher

STD, SHAPE, GUIDANCE = 0.7, (4, 4, 4), 3.0


def mean(value: float, bsz: int = 256) -> Cond:
    return Cond({"mean": torch.full((bsz, 1, 1, 1), value)})


class Fixed(GaussianTeacher):
    """A Gaussian's posterior mean at a mean of its own, whatever the condition says."""

    def __init__(self, own: float) -> None:
        super().__init__(FlowPath(), STD)
        self.own = own

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return super().posterior_mean(x_t, t, mean(self.own, x_t.shape[0]))


def noise(seed: int, bsz: int = 256) -> Tensor:
    return torch.randn(bsz, *SHAPE, generator=torch.Generator().manual_seed(seed))


def lag(student: float, fake: float, seed: int = 0) -> tuple[float, float]:
    """The teacher is guided to -1 + 3 (0 - -1) = 2."""
    x0 = student + STD * noise(seed)
    teacher = GaussianTeacher(FlowPath(), STD)
    terms = lag_terms(
        teacher, Fixed(fake), x0, mean(0.0), mean(-1.0), FakeFit(GUIDANCE), LAG_TIMES,
        lambda k: noise(100 + k),
    )  # fmt: skip
    return lag_of(terms)


@pytest.mark.parametrize(
    ("student", "fake", "expected"),
    [(1.0, 1.0, 0.0), (0.5, 0.0, -0.25), (3.0, 0.0, -1.5), (-1.0, 0.0, 0.5)],
)
def test_lag_is_that_of_the_means(student, fake, expected) -> None:
    value, error = lag(student, fake)
    assert value == pytest.approx(expected, abs=0.03)
    assert abs(value - expected) < 4 * error
    assert error < 0.02


def test_no_push_is_no_lag() -> None:
    assert lag_of(torch.zeros(3, 2)) == (0.0, 0.0)


def train(learns: bool) -> tuple[list[float], list[dict[str, str]]]:
    """A student's mean under the score difference, with a fake that follows it or stays at 0."""
    checks = SampleChecks(WatchdogConfig())
    student, fake, means, bad = 0.0, 0.0, [], []
    teacher, t = GaussianTeacher(FlowPath(), STD), torch.full((256,), 0.5).double()
    for step in range(12):
        x0 = student + STD * noise(step)
        x_t = FlowPath().add_noise(x0, noise(50 + step), t)
        real = teacher(x_t, t, mean(0.0), mean(-1.0), GUIDANCE).x0
        own = Fixed(fake)(x_t, t, mean(0.0)).x0
        student -= float(dmd_gradient(x0, real, own, "uniform").mean())
        fake = student if learns else 0.0
        value, error = lag(student, fake, seed=step)
        bad.append(checks.bad(step, {"fake_lag": value, "fake_lag_error": error}))
        means.append(student)
    return means, bad


def test_a_fake_that_learns_leads_to_the_teacher_unremarked() -> None:
    means, bad = train(learns=True)
    assert means[-1] == pytest.approx(2.0, abs=0.05)
    assert not any(bad)


def test_a_fake_that_never_learns_drives_the_student_past_it_and_is_told() -> None:
    means, bad = train(learns=False)
    assert means[-1] > 6.0
    first = next(i for i, found in enumerate(bad) if found)
    assert 1.0 <= means[first] < 3.0  # half of the way to the teacher is a lag of -0.5
    assert all("fake_lag" in found for found in bad[first:])
    assert "lags the student by -3" in bad[-1]["fake_lag"] or means[-1] > 8


# ------------------------------------------------------- methods that guide the fake as well
class Shifted(GaussianTeacher):
    """A fake whose law is the teacher's of every condition, moved by `shift`."""

    def __init__(self, shift: float) -> None:
        super().__init__(FlowPath(), STD)
        self.shift = shift

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return super().posterior_mean(x_t, t, Cond({"mean": cond["mean"] + self.shift}))


def lag_in(recipe: str, student: float, fake: float) -> tuple[float, float]:
    """Lag under a method's own guidance: student and fake of the teacher's law, moved by that."""
    settings = read_yaml(Path("configs/methods") / f"{recipe}.yaml")
    cls = method_class(settings["method"])
    method = cls(cls.Config(**settings["method_config"]), Setting(FlowPath(), "flow"))
    assert method.fake_fit is not None
    terms = lag_terms(
        GaussianTeacher(FlowPath(), STD), Shifted(fake), student + STD * noise(0), mean(0.0),
        mean(-1.0), method.fake_fit, LAG_TIMES, lambda k: noise(100 + k),
    )  # fmt: skip
    return lag_of(terms)


@pytest.mark.parametrize("recipe", ["vsd", "snoopi", "swiftbrush_v2"])
def test_a_lag_is_seen_where_both_branches_are_guided(recipe: str) -> None:
    """Guided alike they differ by the fake's own shift: lag = (student - fake) / fake."""
    stuck, error = lag_in(recipe, student=-0.3, fake=0.1)
    assert stuck == pytest.approx(-4.0, abs=4 * error)
    told = SampleChecks(WatchdogConfig()).bad(1, {"fake_lag": stuck, "fake_lag_error": error})
    assert "the fake lags the student by -4" in told["fake_lag"]
    learning, error = lag_in(recipe, student=-0.3, fake=-0.3)
    assert abs(learning) < 4 * error < 0.3


def test_a_fake_that_is_fitted_guided_is_judged_guided() -> None:
    """SiD-LSG: the guided fake is the student's denoiser; guided by 2 its mean is 1 further on."""
    fit = FakeFit(teacher=1.0, fake=2.0, fitted=2.0)
    for student, expected in ((1.1, 0.0), (2.1, 1.0 / 1.1)):
        terms = lag_terms(
            GaussianTeacher(FlowPath(), STD), Shifted(0.1), student + STD * noise(0), mean(0.0),
            mean(-1.0), fit, LAG_TIMES, lambda k: noise(100 + k),
        )  # fmt: skip
        assert lag_of(terms)[0] == pytest.approx(expected, abs=0.05)
