"""What Wan adds: videos, latents by channel, a time for each token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stepdistill.config.tuning import Tuning
from stepdistill.core.method import Role
from stepdistill.core.solvers import SamplerSpec
from stepdistill.families.wan import WanFamily
from stepdistill.roles.rolebank import RoleBank
from stepdistill.sampling import sample_images, to_pil
from stepdistill.testing.parity import LIMIT, check_family
from stepdistill.testing.tiny_video import tiny_wan


class WrongChannels(WanFamily):
    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().latents(images, generator).roll(1, dims=1)


class WrongTimes(WanFamily):
    def token_times(self, x_t: Tensor, model_t: Tensor) -> Tensor:
        return super().token_times(x_t, model_t / 1000)


@pytest.mark.full
@pytest.mark.parametrize(("wrong", "row"), [(WrongChannels, "vae"), (WrongTimes, "denoiser")])
def test_check_finds_a_wrong_adapter(wrong, row) -> None:
    found = [name for name, value in check_family(wrong(tiny_wan())) if not value < LIMIT]
    assert any(name.startswith(row) for name in found)


def test_sizes_in_frames_and_pixels() -> None:
    family = WanFamily(tiny_wan())
    assert family.sample_shape() == (4, 2, 4, 8)
    assert family.sample_shape(32, 16) == (4, 2, 8, 4)
    with pytest.raises(ValueError, match="multiple of 8 px"):
        family.sample_shape(20, 16)
    assert family.images(torch.zeros(1, 4, 2, 4, 8)).shape == (1, 3, 5, 16, 32)
    assert family.latents(torch.zeros(1, 3, 5, 16, 32)).shape == (1, 4, 2, 4, 8)


def test_without_an_entry_the_stock_calls_size_holds() -> None:
    pipeline = tiny_wan()
    pipeline.vae.register_to_config(sample_size=None)
    family = WanFamily(pipeline)
    assert family.sample_shape() == (4, 21, 120, 208)  # 81 frames of 480 x 832 px, factor 4
    assert family.call_extras == {"num_frames": 81, "height": 480, "width": 832}


def test_shift_is_read_from_unipc() -> None:
    assert WanFamily(tiny_wan()).shift == 3.0


def test_each_token_has_a_time_where_the_pipeline_says_so() -> None:
    family = WanFamily(tiny_wan(expand_timesteps=True))
    times = family.token_times(torch.zeros(2, 4, 2, 4, 8), torch.tensor([999.0, 500.0]))
    assert times.shape == (2, 2 * 2 * 4)
    assert times[:, 0].tolist() == times[:, -1].tolist() == [999.0, 500.0]


def test_scorers_see_the_middle_frame() -> None:
    family = WanFamily(tiny_wan())
    bank = RoleBank(family, {"teacher": Role()}, Tuning())
    latents = torch.randn(2, 4, 2, 4, 8)
    with torch.no_grad():
        assert torch.equal(bank.images(latents), family.images(latents)[:, :, 2])


def test_validation_lays_frames_side_by_side() -> None:
    video = torch.arange(5.0).div(4).view(1, 1, 5, 1, 1).expand(1, 3, 5, 16, 32) * 2 - 1
    strip = to_pil(video)[0]
    assert strip.size == (5 * 32, 16)
    assert [strip.getpixel((32 * i + 7, 3))[0] for i in range(5)] == [0, 64, 128, 191, 255]
    family = WanFamily(tiny_wan())
    teacher = RoleBank(family, {"teacher": Role()}, Tuning())["teacher"]
    images = sample_images(teacher, family, SamplerSpec((1.0,)), ["a", "b"])
    assert [image.size for image in images] == [(160, 16)] * 2
