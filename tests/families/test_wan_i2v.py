"""Wan image to video: where the first frame goes, and that no loss sees the one that is kept."""

from __future__ import annotations

import pytest
import torch
from support.runs import TinyData, build_trainer, teacher_dir
from torch import Tensor

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.solvers import SamplerSpec, sample_x0
from stepdistill.core.types import Cond
from stepdistill.families.wan_i2v import WanImageToVideoFamily
from stepdistill.losses.score import dmd_gradient, surrogate
from stepdistill.roles.rolebank import RoleBank
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny_video import tiny_wan_i2v
from stepdistill.training.batches import BatchMaker


def kept() -> WanImageToVideoFamily:
    return WanImageToVideoFamily(tiny_wan_i2v(expand_timesteps=True))


def frames(count: int = 2) -> Tensor:
    """(B, 3, H, W) that 8 bits hold exactly."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 16, 32), generator=generator) / 127.5 - 1


class OneTime(WanImageToVideoFamily):
    def token_times(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        return model_t.float().unsqueeze(1).expand(-1, super().token_times(x_t, model_t).shape[1])


class NoMask(WanImageToVideoFamily):
    def encode(self, prompts) -> Cond:
        cond = super().encode(prompts)
        frame = cond["frame"].clone()
        frame[:, :4] = 0
        return Cond({**cond.tensors, "frame": frame})


class NoTokens(WanImageToVideoFamily):
    def encode(self, prompts) -> Cond:
        cond = super().encode(prompts)
        return Cond({**cond.tensors, "frame_tokens": torch.zeros_like(cond["frame_tokens"])})


@pytest.mark.full
@pytest.mark.parametrize(
    ("wrong", "expands", "row"),
    [(OneTime, True, "denoiser"), (NoMask, False, "denoiser"), (NoTokens, False, "encode")],
)
def test_check_finds_a_wrong_adapter(wrong, expands, row) -> None:
    rows = check_family(wrong(tiny_wan_i2v(expand_timesteps=expands)))
    assert any(name.startswith(row) for name, value in rows if not value < LIMIT)


def test_a_kept_frame_is_the_x0_of_every_prediction() -> None:
    family = kept()
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    cond = family.with_images(
        family.encode_text(["a", "b"]), {"image": frames()}, family.sample_shape()
    )
    x, t = torch.randn(2, 4, 2, 4, 8), torch.tensor([0.9, 0.05]).double()
    with torch.no_grad():
        x0 = teacher(x, t, cond, family.null_for(cond), 4.0).x0
    assert torch.allclose(x0[:, :, :1].float(), cond["frame"], atol=1e-5)
    assert not torch.allclose(x0[:, :, 1:].float(), cond["frame"], atol=1e-2)


def test_no_loss_sees_a_kept_frame() -> None:
    """Two networks that differ agree on it: the score difference and any regression are zero."""
    family = kept()
    bank = RoleBank(family, {"teacher": Role(), "fake": Role(train=True)}, Tuning(rank=2))
    generator = torch.Generator().manual_seed(0)
    for param in bank.members("fake").values():
        param.data += 0.3 * torch.randn(param.shape, generator=generator)
    cond = family.with_images(
        family.encode_text(["a", "b"]), {"image": frames()}, family.sample_shape()
    )
    x, t = torch.randn(2, 4, 2, 4, 8), torch.tensor([0.9, 0.4]).double()
    with torch.no_grad():
        real, fake = bank["teacher"](x, t, cond).x0, bank["fake"](x, t, cond).x0
        gradient = dmd_gradient(torch.zeros_like(x), real, fake)
    assert float(gradient[:, :, 0].abs().max()) < 1e-5
    assert float(gradient[:, :, 1:].abs().max()) > 1e-3


def test_a_kept_frame_biases_no_mean() -> None:
    """The gradient of the later frames is that of means over them alone: the frame of zeros lowers
    the normaliser by as much as the mean of the loss."""
    generator = torch.Generator().manual_seed(0)
    x0, real, fake = torch.randn(3, 2, 4, 5, 4, 8, generator=generator)
    for tensor in (real, fake):
        tensor[:, :, 0] = x0[:, :, 0]
    grads = []
    for frames in (slice(0, None), slice(1, None)):
        x = x0[:, :, frames].clone().requires_grad_()
        gradient = dmd_gradient(x.detach(), real[:, :, frames], fake[:, :, frames])
        surrogate(x, gradient).backward()
        grads.append(x.grad)
    assert torch.equal(grads[0][:, :, 0], torch.zeros_like(grads[0][:, :, 0]))
    assert torch.allclose(grads[0][:, :, 1:], grads[1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["ode", "renoise"])
def test_sampling_ends_with_the_clean_frame(kind) -> None:
    family = kept()
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    cond = family.with_images(
        family.encode_text(["a", "b"]), {"image": frames()}, family.sample_shape()
    )
    noise = torch.randn(2, 4, 2, 4, 8)
    spec = SamplerSpec((1.0, 0.5), kind)
    x0 = sample_x0(teacher, spec, noise, cond, fresh_noise=lambda _: noise)
    assert torch.allclose(x0[:, :, :1].float(), cond["frame"], atol=1e-5)


@pytest.mark.parametrize("expands", [False, True])
def test_batches_take_the_items_frame_for_both_passes(expands) -> None:
    family = WanImageToVideoFamily(tiny_wan_i2v(expand_timesteps=expands))
    raw = {"index": [0, 1], "prompt": ["a", "b"], "image": frames()}
    batch = BatchMaker(family, torch.device("cpu"))(raw)
    assert batch.x0 is None
    assert torch.equal(batch.cond["frame"], batch.null["frame"])
    assert not torch.equal(batch.cond["frame"][0], batch.cond["frame"][1])
    assert torch.equal(batch.null["prompt_embeds"], family.null(2)["prompt_embeds"])
    first = family.with_images(
        family.encode_text(["a"]), {"image": frames()[:1]}, family.sample_shape()
    )
    assert torch.equal(batch.cond["frame"][:1], first["frame"])
    if expands:  # a causal encoder: the first latent of a video is that of its first frame
        video = frames()[:1].unsqueeze(2).expand(-1, -1, 5, -1, -1)
        assert torch.allclose(first["frame"], family.latents(video)[:, :, :1], atol=1e-5)


@pytest.mark.usefixtures("no_loading")
def test_a_first_frame_of_another_size_is_refused_before_loading(
    tmp_path, tmp_path_factory
) -> None:
    teacher = teacher_dir("wan_i2v", tmp_path_factory)
    data = TinyData((4, 2, 4, 8), "prompt", (), "image")
    data.items[0]["image"] = torch.zeros(3, 32, 16)
    with pytest.raises(ValueError, match=r"first frames of 16 x 32 px .* got 32 x 16"):
        build_trainer("dmd2", teacher, "lora", tmp_path / "run", dataset=data)


def test_items_without_a_frame_are_refused_before_loading(tmp_path, tmp_path_factory) -> None:
    teacher = teacher_dir("wan_i2v", tmp_path_factory)
    trainer = build_trainer("dmd2", teacher, "lora", tmp_path / "run")
    with pytest.raises(ValueError, match="first frame"):
        type(trainer)(str(teacher), trainer.args, ["a prompt"], method="dmd2")
    items = TinyData(trainer.family.sample_shape(), "prompt", (), beside="image")
    build = {"method": "dmd2", "method_config": {"gan": {"weight_g": 1e-2}}}
    with pytest.raises(ValueError, match="expected batch fields"):
        type(trainer)(str(teacher), trainer.args, items, **build)
