"""A causal video student of dmd2: its rollouts, its first regression, a run, and its export."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from support.runs import build_trainer, fingerprint, teacher_dir

from stepdistill.config.tuning import Tuning
from stepdistill.core.causal import Following, causal_input
from stepdistill.core.context import Ctx
from stepdistill.core.denoiser import Denoiser
from stepdistill.core.method import Role, Setting
from stepdistill.core.path import FlowPath
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.types import Batch, Cond
from stepdistill.export.pipeline import RECORD
from stepdistill.families.wan import WanFamily
from stepdistill.methods.causal import chunk_steps, ode_loss
from stepdistill.methods.dmd2 import DMD2
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.analytic import GaussianTeacher
from stepdistill.testing.tiny_video import tiny_wan

pytestmark = pytest.mark.filterwarnings("ignore:.*no stock pipeline makes such clips")
SETTING = Setting(FlowPath(), "flow", 3.0)
OPTIONS = {"chunk": 1, "num_steps": 2, "critic_steps": 1, "sampler": "ode", "guidance": 2.0}


def method(**options) -> DMD2:
    return DMD2(DMD2.Config(**{**OPTIONS, **options}), SETTING)


@pytest.fixture
def bank() -> RoleBank:
    """A causal student of chunks of one frame, moved off the teacher."""
    roles = {"teacher": Role(), "student": Role(train=True, extra_inputs=(causal_input(1),))}
    made = RoleBank(WanFamily(tiny_wan()), roles, Tuning(student="full"))
    with torch.no_grad():
        for param in made.members("student").values():
            param.add_(torch.randn_like(param), alpha=0.02)
    return made


def batch_of(bank: RoleBank, x0=None) -> Batch:
    cond, null = bank.family.encode(["a", "b"]), bank.family.null(2)
    return Batch(cond, null, (4, 2, 4, 8), x0=x0)


@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_a_rollout_is_what_sampling_makes(kind, bank) -> None:
    """The last step's x0 of a rollout is the sampler's result of the same noise."""
    rollout, batch = method(sampler=kind).rollout, batch_of(bank)
    sample = rollout.sample_at(bank, batch, Ctx(seed=3), 1)
    if kind == "ode":
        noise = Ctx(seed=3).randn((2, 4, 2, 4, 8))
        spec = SamplerSpec(rollout.times, kind, chunk=1)
        x0 = sample_x0(bank["student"], spec, noise, batch.cond)
        assert torch.allclose(sample.x0, x0, atol=1e-6)
    assert sample.x0.requires_grad
    (grad,) = (
        torch.autograd.grad(sample.x0[:, :, 0].sum(), [sample.x_t], allow_unused=True)
        if (sample.x_t.requires_grad)
        else (None,)
    )
    assert grad is None  # no graph reaches an input: the past is a value


@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_sampling_remembers_the_past(kind, bank) -> None:
    """With the cache of keys and values, and with the past told anew in every call."""
    noise, cond = torch.randn(2, 4, 4, 4, 8), batch_of(bank).cond
    spec, frames = SamplerSpec((1.0, 0.9, 0.6), kind, chunk=1), []
    net = bank.base_of("student")
    hook = net.register_forward_pre_hook(
        lambda _, __, kwargs: frames.append(kwargs["hidden_states"].shape[2]), with_kwargs=True
    )
    how = (spec, noise, cond, None, None, lambda step: noise.roll(step + 1, dims=2))
    cached = sample_x0(bank["student"], *how)
    assert frames == [1] * (4 * 3 + 3)  # a call more for each chunk but the last, written down
    hook.remove()
    with patch.object(type(bank["student"]), "remembered", Denoiser.remembered):
        anew = sample_x0(bank["student"], *how)
    assert torch.allclose(cached, anew, atol=1e-5)


class PastValues:
    """Hooks by which an uncached call's keys and values of all frames but the last are values, as
    they are of a cache; without, its gradient reaches the weights through the past as well."""

    def __init__(self, net) -> None:
        self.tokens = 0
        net.register_forward_pre_hook(self.see, with_kwargs=True)
        for block in net.blocks:
            for layer in (block.attn1.norm_k, block.attn1.to_v):
                layer.register_forward_hook(self.cut)

    def see(self, _net, _args, kwargs) -> None:
        self.tokens = kwargs["hidden_states"][0, 0, 0].numel() // 4  # of a frame

    def cut(self, _layer, _args, out):
        return torch.cat([out[:, : -self.tokens].detach(), out[:, -self.tokens :]], dim=1)


@pytest.mark.full
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("kind", "k"), [("ode", 0), ("ode", 2), ("renoise", 1)])
def test_the_cached_rollout_is_the_uncached_one(kind, k, checkpointed, bank) -> None:
    """x0, inputs and gradients; recomputed blocks see the chunks that they saw forward."""
    rollout = method(sampler=kind, num_steps=3).rollout
    cond, frames = batch_of(bank).cond, []
    batch, weight = Batch(cond, cond, (4, 4, 4, 8)), torch.randn(2, 4, 4, 4, 8)
    net, params = bank.base_of("student"), list(bank.members("student").values())
    hook = net.register_forward_pre_hook(
        lambda _, __, kwargs: frames.append(kwargs["hidden_states"].shape[2]), with_kwargs=True
    )

    def made():
        sample = rollout.sample_at(bank, batch, Ctx(seed=3), k)
        grads = torch.autograd.grad((sample.x0 * weight).sum(), params)
        return (sample.x0, sample.x_t, *grads)

    PastValues(net)
    with patch.object(type(bank["student"]), "remembered", Denoiser.remembered):
        uncached = made()
    assert frames == [f for f in (1, 2, 3, 4) for _ in range(k + 1)]
    frames.clear()
    if checkpointed:
        bank.enable_gradient_checkpointing()
    cached = made()
    assert frames == [1] * (4 * (k + 1) + 3)
    hook.remove()
    for ours, theirs in zip(cached, uncached, strict=True):
        scale = 1.0 + float(theirs.abs().max())
        assert float((ours - theirs).abs().max()) < 1e-5 * scale


def test_frames_see_the_past_and_not_the_future(bank) -> None:
    rollout, batch = method().rollout, batch_of(bank)
    made = rollout.sample_at(bank, batch, Ctx(seed=3), 1).x0
    params = list(bank.members("student").values())
    first = torch.autograd.grad(made[:, :, 0].square().sum(), params, retain_graph=True)
    past = Following(bank["student"], made[:, :, :1].detach())
    other = Following(bank["student"], made[:, :, :1].detach() + 1.0)
    x, t = torch.randn(2, 4, 1, 4, 8), torch.full((2,), 0.7).double()
    with torch.no_grad():
        changed = past(x, t, batch.cond).x0 - other(x, t, batch.cond).x0
    assert float(changed.abs().max()) > 1e-4
    assert sum(float(g.abs().sum()) for g in first) > 0.0


def test_of_real_videos_each_chunk_has_a_time_of_its_own(bank) -> None:
    seen = []
    x0 = torch.randn(2, 4, 2, 4, 8)
    with bank.watched(lambda role, pred: seen.append(pred.t)):
        sample = method(rollout="data").rollout.sample_at(bank, batch_of(bank, x0), Ctx(seed=1), 0)
    (t,) = seen
    assert t.shape == (2, 2)
    assert sample.x0.shape == x0.shape
    steps = chunk_steps(Ctx(seed=1), 2000, 7, 3, 4)
    assert steps.shape == (2000, 7)
    assert bool((steps[:, :3] == steps[:, :1]).all())
    assert 0.2 < float((steps[:, 0] == steps[:, 3]).float().mean()) < 0.3


def test_the_regression_is_of_noisy_frames_alone(bank) -> None:
    """A student that gives back its input: right where a frame is clean, so only others count."""

    class Idle:
        def __getitem__(self, role):
            return self

        def __call__(self, x_t, t, cond):
            self.x_t, self.t = x_t, t
            return type("Pred", (), {"x0": x_t})

    idle, times = Idle(), (1.0, 0.75)
    teacher = bank["teacher"]
    losses = [
        float(ode_loss(idle, teacher, batch_of(bank), Ctx(seed=s), SETTING, 3, times, 1, 2.0))
        for s in range(6)
    ]
    assert sum(losses) > 0.0
    assert set(idle.t.unique().tolist()) <= {0.0, 0.75, 1.0}


@pytest.mark.parametrize("seed", range(4))
def test_the_regression_is_the_distance_from_the_teacher_s_own_end(seed: int) -> None:
    """A teacher of one video alone ends there; the student's error is its distance per frame."""
    wanted = torch.randn(2, 4, 2, 4, 8, dtype=torch.float64)
    teacher = GaussianTeacher(FlowPath(), 0.5)
    cond = Cond({"mean": wanted})
    seen: dict[str, torch.Tensor] = {}

    def student(x_t, t, cond):
        seen.update(x_t=x_t, t=t)
        return type("Pred", (), {"x0": torch.full_like(x_t, 0.3)})

    setting = Setting(FlowPath(), "flow", 1.0)
    batch, times = Batch(cond, Cond({"mean": 0 * wanted}), (4, 2, 4, 8)), (1.0, 0.5)
    ctx = (Ctx(seed=seed), setting, 2, times, 1, 1.0)
    loss = ode_loss({"student": student}, teacher, batch, *ctx)
    noise = Ctx(seed=seed).randn((2, 4, 2, 4, 8))
    at = {1.0: noise, 0.5: teacher(noise, torch.ones(2), cond).step(torch.full((2,), 0.5))}
    end = teacher(at[0.5], torch.full((2,), 0.5), cond).x0
    at[0.0] = end
    for i in range(2):
        for frame in range(2):
            level = at[float(seen["t"][i, frame])]
            torch.testing.assert_close(
                seen["x_t"][i, :, frame].double(), level[i, :, frame].double()
            )
    noisy = seen["t"] > 0
    errors = (0.3 - end).square().mean((1, 3, 4))[noisy]
    expected = float(errors.mean()) if noisy.any() else 0.0
    assert float(loss) == pytest.approx(expected, rel=1e-5)


def four_frames(folder):
    """A saved teacher of four latent frames, two chunks of two."""
    pipeline = tiny_wan()
    pipeline.vae.register_to_config(sample_size=[13, 16, 32])
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize("warm", [0, 1])
def test_a_run_resumes_and_exports_to_skyreels(warm, tmp_path) -> None:
    """The regression, then Self Forcing's rollouts; the stock pipeline makes the sampler's clip."""
    teacher = four_frames(tmp_path / "teacher")
    options = {
        **OPTIONS,
        "chunk": 2,
        "warm_start": {"updates": warm, "teacher_steps": 3},
        "shift": 5.0,
    }
    how = {"method_options": options, "checkpointing_steps": 1}
    trainer = build_trainer("dmd2", teacher, "full", tmp_path / "run", **how)
    trainer.train()
    again = build_trainer(
        *("dmd2", teacher, "full", tmp_path / "run"),
        **how,
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"),
    )
    again.train()
    for role in ("student", "fake"):
        assert fingerprint(again.bank.members(role)) == fingerprint(trainer.bank.members(role))
    if warm:
        return
    out = trainer.export(tmp_path / "out")  # compares images
    record = json.loads((out / RECORD).read_text())
    assert record["call"]["ar_step"] == 2
    assert record["call"]["causal_block_size"] == 2
    stock = SkyReelsV2DiffusionForcingPipeline.from_pretrained(out)
    assert stock.transformer.config.num_frame_per_block == 2
    assert "ar_step=2" in (out / "README.md").read_text()


@pytest.mark.parametrize("options", [{}, {"chunk": 3, "sampler": "renoise"}])
def test_what_no_stock_class_plays_is_told_before_training(options) -> None:
    with pytest.warns(UserWarning, match=r"chunk \d, sampler \w+: no stock pipeline"):
        DMD2.Config(**{**OPTIONS, **options})


REFUSED = {
    "lora": ("wan", "lora", {}, "tuning.student: expected full of a student with extra inputs"),
    "an image model": ("sd3", "full", {}, "expected a text-to-video model of one denoiser"),
    "image to video": ("wan_i2v", "full", {}, "expected a text-to-video model of one denoiser"),
    "two experts": ("wan_experts", "full", {}, "expected a text-to-video model of one denoiser"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.usefixtures("no_loading")
def test_refused_before_loading(case, tmp_path, tmp_path_factory) -> None:
    family, layout, options, message = REFUSED[case]
    teacher = teacher_dir(family, tmp_path_factory)
    with pytest.raises(ValueError, match=message):
        build_trainer(
            *("dmd2", teacher, layout, tmp_path / "run"), method_options={**OPTIONS, **options}
        )


def test_chunks_of_one_frame_have_no_stock_mask(tmp_path, tmp_path_factory) -> None:
    trainer = build_trainer(
        *("dmd2", teacher_dir("wan", tmp_path_factory), "full", tmp_path / "run"),
        method_options=OPTIONS,
    )
    with pytest.raises(ValueError, match="export: expected chunks of two latent frames or more"):
        trainer.export(tmp_path / "out")


def test_a_chunk_that_divides_no_clip_is_refused(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("wan", tmp_path_factory)
    with pytest.raises(ValueError, match="chunk: expected a divisor of the model's 2 latent"):
        build_trainer(
            *("dmd2", teacher, "full", tmp_path / "run"), method_options={**OPTIONS, "chunk": 3}
        )
