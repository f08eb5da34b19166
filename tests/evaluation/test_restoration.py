"""PSNR and SSIM against their definitions, and judges of pairs beside them."""

from __future__ import annotations

import pytest
import torch
from support.runs import learned_network

from stepdistill.evaluation.restoration import restoration
from stepdistill.losses.pixels import PixelOptions
from stepdistill.rewards.features import PixelFeatures


def pictures(bsz: int = 2, side: int = 32) -> torch.Tensor:
    made = torch.rand(bsz, 3, side, side, generator=torch.Generator().manual_seed(0))
    return ((0.2 + 0.6 * made) * 255).round() / 255


def test_an_even_error_has_the_psnr_of_its_size() -> None:
    """Of 5 / 255 everywhere: 20 log10(255 / 5), each image by itself."""
    images = pictures()
    off = torch.cat([images[:1] + 5 / 255, images[1:] - 10 / 255])
    values = restoration(off, images)
    expected = [20 * torch.log10(torch.tensor(255 / n)).item() for n in (5.0, 10.0)]
    assert values["psnr"].tolist() == pytest.approx(expected, abs=1e-3)
    assert values["ssim"].shape == (2,)
    assert bool((values["ssim"] < 1).all())


def test_the_same_images_have_ssim_one_and_no_distance(tmp_path) -> None:
    judge = PixelFeatures(PixelOptions(network=str(learned_network(tmp_path))))
    values = restoration(pictures(), pictures(), judges={"features": judge})
    assert torch.allclose(values["ssim"], torch.ones(2))
    assert values["features"].tolist() == [0.0, 0.0]
    further = restoration(pictures().flip(-1), pictures(), judges={"features": judge})
    assert bool((further["features"] > 0).all())


def test_the_border_is_left_out_and_eight_bits_are_compared() -> None:
    images = pictures()
    edged = images.clone()
    edged[..., :4, :] = 0.0
    edged += 0.4 / 255
    assert torch.allclose(restoration(edged, images)["ssim"], torch.ones(2))
    assert bool(restoration(edged, images)["psnr"].isinf().all())
    assert float(restoration(edged, images, crop_px=0)["psnr"].max()) < 20


def test_luma_hears_green_most() -> None:
    images = torch.full((3, 3, 16, 16), 0.4)
    tinted = images.clone()
    for channel in range(3):
        tinted[channel, channel] += 51 / 255
    values = restoration(tinted, images, crop_px=0, luma=True)["psnr"]
    shares = torch.tensor([65.481, 128.553, 24.966]) / 255 * 0.2
    assert values.tolist() == pytest.approx((-20 * shares.log10()).tolist(), abs=1e-3)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((1, 3, 32, 32), (1, 3, 16, 16)), {}, "of one shape, got"),
        (((1, 1, 32, 32), (1, 1, 32, 32)), {}, r"expected images and references \(B, 3, H, W\)"),
        (((1, 3, 16, 16), (1, 3, 16, 16)), {}, "11 px a side or more within a border of 4"),
    ],
)
def test_what_cannot_be_compared_is_refused(shapes, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        restoration(*(torch.zeros(shape) for shape in shapes), **options)
