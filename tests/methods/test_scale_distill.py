"""Scale distillation on Gaussian images of which a low resolution tells a part."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support.jumps import FLOW, SETTINGS, SHAPE, VP, Ctx64
from torch import Tensor

from stepdistill.config.run import RunConfig
from stepdistill.core.method import Setting
from stepdistill.core.path import VEPath
from stepdistill.core.types import Batch, Cond
from stepdistill.methods import METHODS
from stepdistill.methods.scale_distill import ScaleDistill, ScaleDistillConfig
from stepdistill.testing.analytic import AnalyticDenoiser, AnalyticNets, GaussianTeacher

CONFIGS = Path(__file__).parents[2] / "configs" / "methods"
PATHS = {**SETTINGS, "ve": (VEPath(), 1.0)}
MIDDLE, FINE = 0.8, 0.5  # deviations of what l_{N/2} alone tells, and of what neither does
COARSE = (MIDDLE**2 + FINE**2) ** 0.5  # of what l_N does not tell


def make(setting: str = "flow", kind: str = "v", **options) -> ScaleDistill:
    path, shift = PATHS[setting]
    return ScaleDistill(ScaleDistillConfig(**options), Setting(path, kind, shift))


def images(bsz: int = 256) -> Batch:
    """x0 = l_{N/2} + fine, l_{N/2} = l_N + middle; float64."""
    generator = torch.Generator().manual_seed(0)
    low, middle, fine = torch.randn(3, bsz, *SHAPE, generator=generator, dtype=torch.float64)
    easier, null = low + MIDDLE * middle, Cond({"mean": torch.zeros_like(low)})
    data = easier + FINE * fine
    return Batch(Cond({"mean": low}), null, SHAPE, x0=data, easier=(Cond({"mean": easier}), null))


class Shifted(GaussianTeacher):
    """An exact denoiser plus an error."""

    def __init__(self, path, std: float, error: Tensor | float = 0.0) -> None:
        super().__init__(path, std)
        self.error = error

    def posterior_mean(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return super().posterior_mean(x_t, t, cond) + self.error


def loss_of(method: ScaleDistill, student: AnalyticDenoiser, batch: Batch, kind="x0") -> Tensor:
    nets = {"teacher": GaussianTeacher(method.setting.path, FINE, kind), "student": student}
    (phase,) = method.phases(0)
    return phase.loss(AnalyticNets(nets), batch, Ctx64(seed=1)).total


def drawn_times(method: ScaleDistill, bsz: int) -> Tensor:
    ctx = Ctx64(seed=1)
    ctx.randn((bsz, *SHAPE))
    return method.draw_times(ctx, bsz)


# ------------------------------------------------------------------------------ at the solution
@pytest.mark.parametrize("weight", ["none", "v"])
@pytest.mark.parametrize("setting", PATHS)
def test_no_loss_where_both_see_the_same_image(setting, weight) -> None:
    """l_N = l_{N/2} and the student the teacher: the very x_t, t and noise of both."""
    method, batch = make(setting, weight=weight), images()
    same = replace(batch, cond=batch.easier[0])
    assert loss_of(method, GaussianTeacher(method.setting.path, FINE), same) == 0.0
    assert loss_of(method, GaussianTeacher(method.setting.path, FINE), batch) > 1e-2


@pytest.mark.parametrize("target", ["teacher", "images"])
@pytest.mark.parametrize("setting", ["vp", "flow"])
def test_both_targets_end_at_the_denoiser_of_the_harder_image(setting, target) -> None:
    """E[E[x0 | x_t, l_{N/2}] | x_t, l_N] = E[x0 | x_t, l_N]: no gradient but the sample's; and what
    is left of the loss is that variance, less the teacher's own where it is the target."""
    method, batch = make(setting, target=target), images(8192)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = loss_of(method, Shifted(method.setting.path, COARSE, theta), batch)
    loss.backward()
    alpha, sigma = method.setting.path.coeffs(drawn_times(method, 8192))

    def variance(std: float) -> float:
        return float((std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)).mean())

    expected = variance(COARSE) - (variance(FINE) if target == "teacher" else 0.0)
    assert float(loss) == pytest.approx(expected, rel=0.02)
    assert abs(float(theta.grad)) < 0.02


def test_the_teacher_s_target_scatters_less_than_the_images() -> None:
    losses = {}
    for target in ("teacher", "images"):
        method = make("vp", target=target)
        losses[target] = loss_of(method, GaussianTeacher(VP, COARSE), images(4096))
    assert losses["teacher"] < 0.8 * losses["images"]


# -------------------------------------------------------------------------------- off the solution
@pytest.mark.parametrize("weight", ["none", "v"])
@pytest.mark.parametrize("setting", ["vp", "flow", "ve"])
def test_gradient_of_a_shifted_answer_has_its_closed_form(setting, weight) -> None:
    """x0 + theta: d loss / d theta = 2 theta mean(w), w = 1 or 1 / sigma^2."""
    method, batch = make(setting, weight=weight), images(64)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    same = replace(batch, cond=batch.easier[0])
    loss_of(method, Shifted(method.setting.path, FINE, theta), same).backward()
    w = (
        torch.ones(())
        if weight == "none"
        else method.setting.path.coeffs(drawn_times(method, 64))[1] ** -2
    )
    assert float(theta.grad) == pytest.approx(2 * 0.3 * float(w.mean()), rel=1e-9)


def test_the_teacher_is_guided_by_the_null_of_the_easier_image() -> None:
    """Null mean 0 and guidance 3: the mean three times as far."""
    method, batch = make(guidance=3.0), images(32)
    thrice = Cond({"mean": 3.0 * batch.easier[0]["mean"]})
    same = replace(batch, cond=thrice)
    assert loss_of(method, GaussianTeacher(FLOW, FINE), same) < 1e-20
    assert method.teacher_guidance == 3.0


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_teachers_of_every_kind_give_the_same_loss(kind) -> None:
    method, batch = make("vp"), images(32)
    student = GaussianTeacher(VP, COARSE)
    expected = float(loss_of(method, student, batch))
    assert float(loss_of(method, student, batch, kind)) == pytest.approx(expected)


def test_no_teacher_is_called_and_no_easier_image_needed_where_images_are_the_target() -> None:
    method = make(target="images")
    assert method.needs == {"cond", "x0"}
    assert set(method.roles()) == {"student"}
    batch = replace(images(8), easier=None)
    student = AnalyticNets({"student": GaussianTeacher(FLOW, COARSE)})
    assert float(method.loss(student, batch, Ctx64()).total) > 0
    with pytest.warns(UserWarning, match="guidance has no effect"):
        assert make(target="images", guidance=2.0).teacher_guidance == 1.0


# ------------------------------------------------------------------------------------- its times
def test_a_share_of_the_times_is_the_student_s_grid_and_all_are_the_table_s() -> None:
    method = make("vp", grid_share=0.25, num_steps=2)
    t = drawn_times(method, 4096)
    on_grid = float(((t == 1.0) | (t == 0.5)).double().mean())
    assert on_grid == pytest.approx(0.25, abs=0.03)
    indices = VP.model_time(t)
    assert torch.equal(indices, indices.round())
    assert (float(indices.min()), float(indices.max())) == (0.0, 999.0)
    rest = t[(t != 1.0) & (t != 0.5)]
    assert float(rest.mean()) == pytest.approx(0.5, abs=0.02)


def test_at_time_one_the_network_sees_pure_noise() -> None:
    """As its one step begins: no trace of x0 that a table's last entry would leave."""
    seen = {}

    class Spy(GaussianTeacher):
        def posterior_mean(self, x_t, t, cond):
            seen["x_t"] = x_t
            return super().posterior_mean(x_t, t, cond)

    method = make("vp", grid_share=1.0, target="images")
    method.loss(AnalyticNets({"student": Spy(VP, 0.5)}), images(16), Ctx64(seed=1))
    assert torch.equal(seen["x_t"], Ctx64(seed=1).randn((16, *SHAPE)))


def test_it_samples_in_any_number_of_steps_from_pure_noise() -> None:
    method = make("vp")
    assert method.sampler().times == (1.0,)
    assert method.sampler(4).times == (1.0, 0.75, 0.5, 0.25)
    assert method.sampler().kind == "ode"


def test_settings_file_is_valid() -> None:
    text = yaml.safe_load((CONFIGS / "scale_distill.yaml").read_text())
    run = RunConfig(pretrained_model_name_or_path="x", **text)
    assert METHODS[run.method].Config(**run.method_config).target == "teacher"
