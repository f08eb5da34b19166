"""f_distill with the exact density ratio of Gaussians as its head."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from support.processes import LIMIT_S
from support.runs import build_trainer, teacher_dir
from support.score import BSZ, PATHS, VP, Affine, Gaussian, Leaf, batch_of, student_loss
from torch import Tensor, nn

from stepdistill.core.context import Ctx
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, NoisePath, VEPath, expand
from stepdistill.core.types import Cond
from stepdistill.losses.divergence import Divergence, divergence_weight
from stepdistill.losses.score import dmd_gradient
from stepdistill.methods.dmd2 import DMD2, DMD2Config
from stepdistill.methods.f_distill import FDistill, FDistillConfig
from stepdistill.methods.gan import GANConfig
from stepdistill.testing.analytic import AnalyticNets

ALL = get_args(Divergence)
MEAN, FACTOR = torch.tensor([1.0, -0.5]), torch.tensor([[0.8, 0.0], [0.5, 0.4]])
SILENT = GANConfig(weight_g=1e-30, source="teacher")  # a head that moves nothing by itself


@pytest.fixture(params=["vp", "flow"])
def path(request: pytest.FixtureRequest) -> NoisePath:
    return PATHS[request.param]


def make(path: NoisePath, **options: object) -> FDistill:
    config = FDistillConfig(**{"guidance": 1.0, "gan": SILENT, **options})  # type: ignore[arg-type]
    return FDistill(config, Setting(path, "x0"))


class Ratio(Gaussian):
    """Teacher N(b, C) whose one feature is log p / q at (x_t, t) against `student`'s law."""

    def __init__(self, path: NoisePath, student: Affine) -> None:
        super().__init__(path, lambda: (MEAN, FACTOR @ FACTOR.T))
        self.student = student
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []  # (x_t, t, log r) of each feature call

    def log_prob(self, x_t: Tensor, t: Tensor, law: tuple[Tensor, Tensor]) -> Tensor:
        alpha, sigma = (c.to(x_t).view(-1, 1, 1) for c in self.path.coeffs(t))
        cov = alpha**2 * law[1].to(x_t) + sigma**2 * torch.eye(2).to(x_t)
        mean = alpha[:, :, 0] * law[0].to(x_t)
        return torch.distributions.MultivariateNormal(mean, cov).log_prob(x_t)

    def raw(
        self,
        x_t: Tensor,
        t: Tensor,
        cond: Cond,
        w: Tensor | None,
        features: Sequence[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        out, feats = super().raw(x_t, t, cond, w, features)
        if features:
            p, q = (self.log_prob(x_t, t, law) for law in (self.law(), self.student.law()))
            self.seen.append((x_t.detach(), t, (p - q).detach()))
            feats = dict.fromkeys(features, (p - q)[:, None])
        return out, feats


class Same(nn.Module):
    """The head: its feature is the logit already, times `gain`."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return self.gain * features["mid"]


def setup(path: NoisePath, gain: float = 1.0) -> tuple[Affine, Ratio, AnalyticNets]:
    student = Affine(path, 0.7 * torch.eye(2), torch.zeros(2))
    teacher = Ratio(path, student)
    roles = {"student": student, "teacher": teacher, "fake": Gaussian(path, student.law)}
    return student, teacher, AnalyticNets(roles, {"disc": Same(gain)})


def gradient(method: DMD2, nets: AnalyticNets, x0: Tensor, ctx: Ctx | None = None) -> Tensor:
    """The gradient on x0 itself."""
    leaf = Leaf(method.setting.path, x0.clone())
    roles = {"student": leaf, "teacher": nets["teacher"], "fake": nets["fake"]}
    batch = batch_of(len(x0), x0=x0)
    student_loss(method, AnalyticNets(roles, nets._heads), batch, ctx).total.backward()
    assert leaf.x0.grad is not None
    return leaf.x0.grad


X0 = torch.randn(BSZ, 2, generator=torch.Generator().manual_seed(3))


# -------------------------------------------------------------------------------- the gradient
def test_reverse_kl_is_dmd2_bit_for_bit(path: NoisePath) -> None:
    _, _, nets = setup(path)
    dmd2 = DMD2(DMD2Config(guidance=1.0), Setting(path, "x0"))
    ours, theirs = gradient(make(path, divergence="rkl"), nets, X0), gradient(dmd2, nets, X0)
    assert ours.abs().max() > 0
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("divergence", ALL)
def test_a_ratio_of_one_everywhere_is_dmd2_bit_for_bit(path: NoisePath, divergence: str) -> None:
    _, _, nets = setup(path, gain=0.0)
    dmd2 = DMD2(DMD2Config(guidance=1.0), Setting(path, "x0"))
    ours = gradient(make(path, divergence=divergence), nets, X0)
    assert torch.equal(ours, gradient(dmd2, nets, X0))


@pytest.mark.parametrize("divergence", ALL)
def test_each_sample_is_weighted_by_h_of_its_ratio_over_the_mean(
    path: NoisePath, divergence: Divergence
) -> None:
    _, teacher, nets = setup(path)
    ours = gradient(make(path, divergence=divergence, ratio_bins=1), nets, X0)
    x_t, t, log_r = teacher.seen[-1]
    ratio = log_r.exp().clamp(0.1, 20.0)
    h = divergence_weight(ratio / ratio.mean(), divergence)
    real, fake = (nets[role](x_t, t, batch_of().cond).x0 for role in ("teacher", "fake"))
    expected = expand(h / h.mean(), X0) * dmd_gradient(X0, real, fake) / X0.numel()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-9)


def test_bins_normalise_the_ratio_in_each_range_of_times() -> None:
    method = make(FlowPath(), divergence="kl", ratio_bins=2, dm_t_range=(0.2, 0.8))
    t = torch.tensor([0.25, 0.3, 0.7, 0.75], dtype=torch.float64)
    logits = torch.tensor([1.0, 3.0, 2.0, 6.0]).log()[:, None]
    weights = method.sample_weights(Ctx(), t, logits)
    torch.testing.assert_close(weights, torch.tensor([0.5, 1.5, 0.5, 1.5]))
    assert method.bins.tolist() == pytest.approx([2.0, 4.0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", list(PATHS))
def test_bins_span_the_times_that_are_drawn(name: str, shift: float) -> None:
    path = VEPath(sigma_max=80.0) if name == "ve" else PATHS[name]
    method = FDistill(FDistillConfig(gan=SILENT), Setting(path, "x0", shift))
    t = method.draw_times(Ctx(), 5000, (0.02, 0.98))
    span = method.high - method.low
    assert method.low <= t.min() < method.low + 0.01 * span
    assert method.high - 0.01 * span < t.max() <= method.high


@pytest.mark.full
@pytest.mark.sampled_in_full
@pytest.mark.parametrize("divergence", ["js", "kl"])
def test_a_linear_generator_recovers_the_teachers_mean_and_covariance(
    path: NoisePath, divergence: str
) -> None:
    student, _, nets = setup(path)
    method, batch = make(path, divergence=divergence), batch_of(256, x0=torch.zeros(256, 2))
    optimizer = torch.optim.Adam([student.weight, student.bias], lr=0.05)
    steps = 400
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1.0 - step / steps)
        optimizer.zero_grad()
        student_loss(method, nets, batch, Ctx(step=step)).total.backward()
        optimizer.step()
    bias, learned = student.law()
    torch.testing.assert_close(bias, MEAN, rtol=0, atol=0.01)
    torch.testing.assert_close(learned, FACTOR @ FACTOR.T, rtol=0, atol=0.01)


def test_the_head_reads_the_gradients_own_noised_sample_and_moves_the_student() -> None:
    """dmd2 draws a time of its own for the head; here h must belong to the very x_t."""
    student, teacher, nets = setup(FlowPath())
    method = make(FlowPath(), dm_t_range=(0.4, 0.5), gan=GANConfig(weight_g=1.0, source="teacher"))
    losses = student_loss(method, nets, batch_of(x0=X0))
    assert 0.4 <= teacher.seen[0][1].min() < teacher.seen[0][1].max() <= 0.5
    assert losses.total.item() == pytest.approx(
        (losses.logs["dm"] + losses.logs["gan_g"]).item(), rel=1e-6
    )
    losses.total.backward()
    assert student.bias.grad.abs().min() > 0


# ------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    "gan",
    [{"weight_g": 0.0}, {"weight_g": 1.0, "loss": "hinge"}, {"weight_g": 1.0, "weight_d": 0.0}],
)
def test_a_head_that_is_no_ratio_is_refused(gan: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="log density ratio"):
        FDistillConfig(gan=gan)  # type: ignore[arg-type]


@pytest.mark.parametrize("clip", [(0.0, 20.0), (2.0, 1.0)])
def test_ratio_bounds_out_of_order_are_refused(clip: tuple[float, float]) -> None:
    with pytest.raises(ValidationError, match="ratio_clip"):
        FDistillConfig(ratio_clip=clip)


def test_images_are_needed() -> None:
    assert make(VP).needs == {"cond", "real"}


def test_a_lone_sample_without_memory_warns_and_has_weight_one() -> None:
    method, t = make(VP, divergence="kl"), torch.tensor([0.5], dtype=torch.float64)
    with pytest.warns(UserWarning, match="no effect"):
        weights = method.sample_weights(Ctx(), t, torch.tensor([[1.3]]))
    assert weights.tolist() == [1.0]


@pytest.mark.parametrize(
    ("options", "bsz", "world_size"),
    [
        ({"ratio_ema": 0.5, "divergence": "kl"}, 1, 1),
        ({"divergence": "kl"}, 2, 1),
        ({"divergence": "kl"}, 1, 2),
        ({"divergence": "kl"}, 2, 2),
        ({"divergence": "rkl"}, 1, 1),
    ],
)
def test_no_warning_with_memory_or_a_batch(
    options: dict[str, object], bsz: int, world_size: int
) -> None:
    t = torch.full((bsz,), 0.5, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(VP, **options).sample_weights(Ctx(world_size=world_size), t, torch.zeros(bsz, 1))


# ------------------------------------------------------------------------------ ranks and state
def test_two_processes_weigh_samples_as_one_does() -> None:
    """Threads that really average: bins and the mean of h are those of the global batch."""
    options = {"divergence": "neyman", "ratio_ema": 0.5, "ratio_bins": 3}
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(16, generator=generator, dtype=torch.float64)
    logits = torch.randn(16, 2, generator=generator)
    alone = make(FlowPath(), **options)
    expected = alone.sample_weights(Ctx(), t, logits)

    barrier, slots = threading.Barrier(2), [torch.empty(0), torch.empty(0)]
    methods = [make(FlowPath(), **options) for _ in range(2)]

    def work(rank: int) -> Tensor:
        def mean(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait(timeout=LIMIT_S)
            out = (slots[0] + slots[1]) / 2
            barrier.wait(timeout=LIMIT_S)
            return out

        rows = slice(8 * rank, 8 * rank + 8)
        ctx = Ctx(rank=rank, world_size=2, mean_over_ranks=mean)
        try:
            return methods[rank].sample_weights(ctx, t[rows], logits[rows])
        except BaseException:
            barrier.abort()  # else the other waits
            raise

    with ThreadPoolExecutor(2) as threads:
        results = [*threads.map(work, range(2))]
    torch.testing.assert_close(torch.cat(results), expected, rtol=1e-6, atol=0)
    assert torch.equal(methods[0].bins, methods[1].bins)
    torch.testing.assert_close(methods[0].bins, alone.bins, rtol=1e-6, atol=0)
    assert expected.mean().item() == pytest.approx(1.0, rel=1e-6)
    assert expected.max() / expected.min() > 2.0


def test_saved_bins_come_back_and_others_are_refused() -> None:
    first, second = make(VP, ratio_ema=0.5), make(VP, ratio_ema=0.5)
    first.sample_weights(Ctx(), torch.rand(8).double(), torch.randn(8, 1))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.bins, first.bins)
    assert not torch.equal(first.bins, torch.ones(10))
    with pytest.raises(ValueError, match="7 bins, got 10"):
        make(VP, ratio_bins=7).load_state_dict(first.state_dict())
    with pytest.raises(ValueError, match="ratio_bins"):
        make(VP).load_state_dict({})


@pytest.mark.full
def test_a_resumed_run_goes_on_with_the_saved_bins(tmp_path: Path, tmp_path_factory) -> None:
    teacher = teacher_dir("sd_v", tmp_path_factory)
    trainer = build_trainer("f_distill", teacher, "lora", tmp_path / "run", checkpointing_steps=1)
    trainer.train()
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "method.safetensors")["ratio_bins"]
    assert not torch.equal(saved, torch.ones(10))
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    again = build_trainer(
        "f_distill", teacher, "lora", tmp_path / "run", resume_from_checkpoint=checkpoint
    )
    again.resume(checkpoint)
    assert torch.equal(again.method.bins, saved)
    again.train()
    assert torch.equal(again.method.bins, trainer.method.bins)
    assert not torch.equal(again.method.bins, saved)
