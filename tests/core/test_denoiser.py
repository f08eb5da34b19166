"""Prediction views and guidance: one convention, the same for every prediction type."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from stepdistill.core.denoiser import Denoiser, is_guided
from stepdistill.core.path import PREDICTION_TYPES, FlowPath, NoisePath, VEPath, VPPath
from stepdistill.core.types import Cond
from stepdistill.testing.analytic import GaussianTeacher

PATHS = [
    VPPath.from_betas(torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    FlowPath(),
    VEPath(),
]


class Counting(GaussianTeacher):
    """A Gaussian teacher that records the batch size of every network call."""

    def __init__(self, path: NoisePath, kind: str = "x0") -> None:
        super().__init__(path, 0.5, kind)  # type: ignore[arg-type]
        self.calls: list[int] = []
        self.told: Tensor | None = None

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.calls.append(x_t.shape[0])
        self.told = w
        return super().raw(x_t, t, cond, w, features)


def inputs(bsz: int = 3) -> tuple[Tensor, Tensor, Cond, Cond]:
    gen = torch.Generator().manual_seed(0)
    x_t = torch.randn(bsz, 1, 2, 2, generator=gen, dtype=torch.float64)
    t = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)[:bsz]
    mean = torch.randn(bsz, 1, 2, 2, generator=gen, dtype=torch.float64)
    return x_t, t, Cond({"mean": mean}), Cond({"mean": torch.zeros_like(mean)})


@pytest.mark.parametrize("path", PATHS, ids=["vp", "flow", "ve"])
def test_views_agree_over_network_types(path: NoisePath) -> None:
    x_t, t, cond, _ = inputs()
    x0 = GaussianTeacher(path, 0.5)(x_t, t, cond).x0
    for kind in PREDICTION_TYPES:
        pred = GaussianTeacher(path, 0.5, kind)(x_t, t, cond)  # type: ignore[arg-type]
        assert pred.kind == kind
        assert (pred.x0 - x0).abs().max() < 1e-12
        for dst in ("eps", "v", "flow"):
            expected = path.convert(x0, x_t, t, "x0", dst)  # type: ignore[arg-type]
            assert (getattr(pred, dst) - expected).abs().max() < 1e-8


@pytest.mark.parametrize("path", PATHS, ids=["vp", "flow", "ve"])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_guidance_commutes_with_conversion(path: NoisePath, kind: str) -> None:
    """null + g (cond - null) on raw outputs of any type guides x0 just so."""
    x_t, t, cond, null = inputs()
    teacher = GaussianTeacher(path, 0.5, kind)  # type: ignore[arg-type]
    plain, without = teacher(x_t, t, cond).x0, teacher(x_t, t, null).x0
    guided = teacher(x_t, t, cond, null, 7.5).x0
    assert (guided - (without + 7.5 * (plain - without))).abs().max() < 1e-11


def test_guidance_per_sample() -> None:
    x_t, t, cond, null = inputs()
    teacher = GaussianTeacher(PATHS[0], 0.5, "eps")
    scales = torch.tensor([1.0, 3.0, 0.0])
    guided = teacher(x_t, t, cond, null, scales).x0
    for row, scale in enumerate(scales.tolist()):
        assert (guided[row] - teacher(x_t, t, cond, null, scale).x0[row]).abs().max() < 1e-12
    assert (guided[0] - teacher(x_t, t, cond).x0[0]).abs().max() < 1e-12
    assert (guided[2] - teacher(x_t, t, null).x0[2]).abs().max() < 1e-12


@pytest.mark.parametrize(("guidance", "calls"), [(None, [3]), (1.0, [3]), (2.0, [6])])
def test_null_pass_only_where_it_counts(guidance: float | None, calls: list[int]) -> None:
    x_t, t, cond, null = inputs()
    teacher = Counting(PATHS[1])
    teacher(x_t, t, cond, null, guidance)
    assert teacher.calls == calls


@pytest.mark.parametrize("guidance", [3.5, torch.tensor([3.5, 3.5, 3.5])])
def test_a_network_that_embeds_guidance_is_told_it_less_one(guidance) -> None:
    x_t, t, cond, null = inputs()
    teacher = Counting(PATHS[1])
    teacher.embeds_guidance = True
    teacher(x_t, t, cond, null, guidance)
    assert teacher.calls == [3], "no null pass"
    assert teacher.told.tolist() == [2.5] * 3
    teacher(x_t, t, cond, null, 1.0)
    assert teacher.told is None


def test_w_given_is_passed_on_and_guidance_beside_it_takes_a_null_pass() -> None:
    x_t, t, cond, null = inputs()
    teacher = Counting(PATHS[1])
    teacher.embeds_guidance = True
    teacher(x_t, t, cond, null, 2.0, w=torch.tensor([4.0, 5.0, 6.0]))
    assert teacher.calls == [6]
    assert teacher.told.tolist() == [4.0, 5.0, 6.0] * 2


def test_is_guided() -> None:
    assert [is_guided(g) for g in (None, 1.0, 1, 0.0, 2.5)] == [False, False, False, True, True]
    assert is_guided(torch.ones(2))


def test_features_are_those_of_the_conditional_half() -> None:
    x_t, t, cond, null = inputs()
    pred = GaussianTeacher(PATHS[1], 0.5)(x_t, t, cond, null, 3.0, features=("mid",))
    assert torch.equal(pred.features["mid"], x_t)


def test_step_is_the_path_step() -> None:
    x_t, t, cond, _ = inputs()
    pred = GaussianTeacher(PATHS[0], 0.5)(x_t, t, cond)
    assert torch.equal(pred.step(0.5 * t), PATHS[0].step(pred.x0, x_t, t, 0.5 * t))


def test_errors() -> None:
    x_t, t, cond, _ = inputs()
    teacher: Denoiser = GaussianTeacher(PATHS[1], 0.5)
    with pytest.raises(ValueError, match=r"t of shape \(B,\) = \(3,\), got \(1,\)"):
        teacher(x_t, t[:1], cond)
    with pytest.raises(ValueError, match="null condition with guidance"):
        teacher(x_t, t, cond, None, 2.0)


@pytest.mark.parametrize(
    ("shape", "t", "taken"),
    [
        ((2, 3, 4, 4), (2,), True),
        ((2, 3, 5, 4, 4), (2,), True),
        ((2, 3, 5, 4, 4), (2, 5), True),  # a time for each frame of a video
        ((2, 3, 5, 4, 4), (2, 3), False),
        ((2, 3, 4, 4), (2, 4), False),
        ((2, 3, 4, 4), (2, 3), False),
        ((2, 3, 4, 4), (1,), False),
    ],
)
def test_a_time_for_each_sample_or_each_frame_of_a_video(shape, t, taken) -> None:
    class Zeros(Denoiser):
        path, kind = FlowPath(), "flow"

        def raw(self, x_t, t, cond, w, features):
            return torch.zeros_like(x_t), {}

    if taken:
        assert Zeros()(torch.ones(shape), torch.ones(t), Cond({})).raw.shape == shape
    else:
        with pytest.raises(ValueError, match=r"expected t of shape \(B,\)"):
            Zeros()(torch.ones(shape), torch.ones(t), Cond({}))
