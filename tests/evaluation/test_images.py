"""The path of an image to a feature network: bits, crop, filter, and its own statistics."""

import numpy as np
import pytest
import torch
from PIL import Image

from stepdistill.evaluation.images import (
    Frame,
    eight_bit,
    image_files,
    open_image,
    pixel_statistics,
    to_tensor,
)


def ramp(width: int = 12, height: int = 8) -> Image.Image:
    pixels = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    return Image.fromarray(pixels)


def test_floats_round_as_a_png_would() -> None:
    (image,) = eight_bit(torch.tensor([[[[0.0], [0.5], [1.2]]]]))
    assert np.asarray(image).tolist() == [[0, 128, 255]]


def test_patch_is_the_middle_without_resizing() -> None:
    assert np.asarray(Frame(crop_px=4)(ramp())).tolist() == np.asarray(ramp())[2:6, 4:8].tolist()


def test_resize_takes_the_middle_square_by_the_named_filter() -> None:
    made = Frame(size_px=4, filter="box")(ramp())
    square = np.asarray(ramp())[:, 2:10].astype(float)
    expected = square.reshape(4, 2, 4, 2).mean(axis=(1, 3))
    assert np.abs(np.asarray(made) - expected).max() <= 0.5
    assert np.asarray(Frame(size_px=4)(ramp())).tolist() != np.asarray(made).tolist()


def test_protocol_says_what_is_done() -> None:
    assert Frame(256, 299, "bicubic").text() == "middle 299 px; square to 256 px, bicubic"
    assert Frame().text() == "as made"


def test_wrong_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="resize_filter: expected one of"):
        Frame(filter="nearest")
    with pytest.raises(ValueError, match="crop_px: expected images of 9 px or more"):
        Frame(crop_px=9)(ramp())


def test_grey_has_no_saturation_and_known_contrast() -> None:
    image = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    assert pixel_statistics(image).tolist() == [[0.0, 0.5]]


def test_saturation_is_of_hsv() -> None:
    red_and_grey = torch.tensor([[0.8, 0.5], [0.2, 0.5], [0.4, 0.5]]).view(1, 3, 1, 2)
    assert float(pixel_statistics(red_and_grey)[0, 0]) == pytest.approx(0.75 / 2)


def test_images_of_a_folder_in_order_and_without_alpha(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    Image.new("RGBA", (2, 2)).save(tmp_path / "b" / "1.png")
    ramp().save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    files = image_files(tmp_path)
    assert [file.name for file in files] == ["a.png", "1.png"]
    assert [open_image(file).mode for file in files] == ["L", "RGB"]


def test_what_is_no_image_is_named(tmp_path) -> None:
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(ValueError, match=r"expected an image, got .*a\.png"):
        open_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"expected one size \(C, H, W\)"):
        to_tensor([ramp(), ramp(4, 4)])


def test_grey_photos_among_coloured_ones_are_coloured_too() -> None:
    grey, red = Image.new("L", (4, 4), 255), Image.new("RGB", (4, 4), "red")
    both = to_tensor([grey, red])
    assert both.shape == (2, 3, 4, 4)
    assert both[0].unique().tolist() == [1.0]
    assert both[1].amax((1, 2)).tolist() == [1.0, 0.0, 0.0]
    assert to_tensor([grey, grey]).shape == (2, 1, 4, 4)
